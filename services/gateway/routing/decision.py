"""What the router answers: a decision with its record, and effects for others that the same step set in motion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from infermesh.errors import Reason
from services.chassis.granting import Want
from services.gateway.routing.facts import Facts
from services.gateway.routing.pulse import Pulse

TERMS = ("wait", "line", "room", "prefill", "reserve", "decode", "preempt")


class Candidate(NamedTuple):
    """An eligible instance. `cost_s` is the sum of `seconds`, one for each of `TERMS`, divided by `weight`.

    `wait`: prompts queued there. `line`: those in this gateway who would go there first. `room`: until a slot and KV
    room are free. `prefill`: this prompt's uncached part, at the price of the backlog. `reserve`: what long prompts
    would wait. `decode`: the answer's seconds, at their share. `preempt`: what overtaking others costs.
    `ready`: it would begin soon.
    """

    id: str
    cost_s: float
    seconds: tuple[float, ...]
    weight: float
    cached_tokens: int
    ready: bool

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        return tuple(zip(TERMS, self.seconds, strict=True))


@dataclass(frozen=True, slots=True)
class Record:
    """Why a request went where it went; candidates and rejected are sorted by id. All that explains reads this.

    `model` is the one that serves; `degraded_from` the one asked for, where another one serves. In a large fleet,
    `unexamined` instances were neither candidates nor rejected: others were plainly free sooner.
    """

    kind: str
    model: str
    chosen: str = ""
    reason: str = ""  # least_cost | only_candidate | tie | backlog | no_room | and the words of refusals
    candidates: tuple[Candidate, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0  # expected
    estimate_s: float = 0.0  # cost of the chosen one
    waited_s: float = 0.0
    cached_tokens: int = 0  # of the prompt, thought to be in the chosen one's cache
    predicted_ttft_s: float = 0.0
    degraded_from: str = ""
    unexamined: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """A reservation on one life of one instance. `seq` is this gateway's number for the attempt; `pulse` is what
    `Router.progressed` moves. `work_us` is what its prompt takes there, `kv_tokens` the room it needs. `grant`: the
    ticket under which the instance granted room, 0 = it was not asked. `patience_us`: what others who overtake it may
    take before it; `rank`: it overtakes none of a lower one."""

    seq: int
    instance_id: str
    incarnation: int
    facts: Facts
    record: Record
    pulse: Pulse = field(default_factory=Pulse, compare=False, repr=False)
    work_us: int = 0
    kv_tokens: int = 0
    grant: int = 0
    patience_us: int = 0
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send it. `ticket` is 0 when it never waited."""

    lease: Lease
    ticket: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """Hold it until an effect names the ticket."""

    ticket: int
    record: Record


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nobody will answer it. `ticket` is 0 when it never waited."""

    reason: Reason
    message: str
    record: Record
    retry_after_s: float | None = None
    ticket: int = 0


@dataclass(frozen=True, slots=True)
class Eject:
    """An instance takes no more work, and why."""

    instance_id: str
    why: str
    cause: str = field(default="", compare=False)  # a word of health.Cause


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the instance whether it is well, then call `probed`."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """Cut the call of this lease: nothing is to be expected of it where it runs. It ends as INSTANCE_LOST."""

    seq: int
    why: str


@dataclass(frozen=True, slots=True)
class Close:
    """A life is over and nothing of ours runs there: its channels may go."""

    instance_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Announce to the instance who waits here for it. A want whose ticket is 0: nobody."""

    instance_id: str
    want: Want


@dataclass(frozen=True, slots=True)
class Decline:
    """Give a grant back to the instance."""

    instance_id: str
    ticket: int


Decision = Dispatch | Wait | Refuse
Effect = Dispatch | Refuse | Eject | Probe | Abandon | Close | Decline
