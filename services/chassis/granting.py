"""The instance as the arbiter of its room: which gateway's waiting request is next. Pure.

Gateways that share nothing see each other's work late, and all of them fill the same gap. So each announces the best
request that waits in it for this instance, and the instance, which hears all of them and alone knows its room, grants
to the best of these. It keeps a short queue of prompts: never empty, never deep. What comes without a grant finds the
room free and nobody waiting, or is refused before it begins.

Times are seconds on one clock, chosen by the caller; work is in microseconds, so that what was added is taken away
exactly.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from registry.endpoint import Endpoint
from services.chassis.fairness import FAIRNESS, LATE_S, SHALLOW, Holdings, Size, Turns
from services.chassis.prompt_line import US as US
from services.chassis.prompt_line import Orders, Pending, PromptLine

FEATURE = "grant"  # in both hellos: asks by Want, understands Grant
DEPTH_S = 0.2  # prefill that an instance keeps queued: never empty, never deep
GUESSED_DEPTH_S = 3.0  # where the speed is a guess, a shallow queue could leave a fast instance idle
STEP_TOKENS = 2048  # of prompts, that one engine step computes together: vLLM's smaller default
EXPIRY_S = 0.5  # a grant that no request has used by then is void: its gateway hangs, or has gone
AGING = 0.02  # a second of waiting outweighs so many seconds of work; those overdue go first anyway
FIRST_RANKS = 3  # before every class: who goes on with an answer, and an overdue request whose turn it is
SIZES = 24  # classes of work by powers of two, the smallest up to 2 ms


def depth_s(endpoint: Endpoint) -> float:
    """Seconds of prefill that this instance keeps queued."""
    return GUESSED_DEPTH_S if _told_tps(endpoint) is None else DEPTH_S


def step_s(endpoint: Endpoint) -> float:
    """Seconds of prompts that it computes together; 0 where unknown."""
    told = _told_tps(endpoint)
    return STEP_TOKENS / told if told else 0.0


def _told_tps(endpoint: Endpoint) -> float | None:
    return endpoint.speed.prefill_tps if endpoint.kind == "llm" else endpoint.speed.tokens_per_s


class Want(NamedTuple):
    """The best request that waits in a gateway for the instance. `age_s`: since it first asked. `bias_us` is added to
    its work when requests are ordered; `late`: it cannot be on time any more. `spare_tokens` of the KV cache must stay
    free beside it. `service_us`: what its tenant is given with it. `line_ms`: work of all who wait there, by size;
    `waiting`: how many."""

    ticket: int
    work_us: int
    kv_tokens: int = 0
    spare_tokens: int = 0
    rank: int = 0
    priority: int = 0
    bias_us: int = 0
    late: bool = False
    tenant: str = ""
    service_us: int = 0
    age_s: float = 0.0
    line_ms: tuple[int, ...] = ()
    waiting: int = 0


def overtakes(want: Want) -> int:
    """The rank by which it overtakes prompts: its class, whoever goes first among those who wait."""
    return want.rank + FIRST_RANKS if want.rank < 0 else want.rank


class Grant(NamedTuple):
    gateway: str
    ticket: int


class Others(NamedTuple):
    """What one gateway is told of all the others."""

    gateways: int  # linked, itself included
    work_us: int  # their prompts that are not yet computed, and what is granted to them
    line_ms: tuple[int, ...]
    waiting: int
    beyond: frozenset[str] = frozenset()  # tenants


@dataclass(slots=True)
class _Booked:
    """Room taken: by a request in flight, whose `kv_tokens` become 0 with its first token, or a grant. `work_us`,
    `service_us`: of the grant, and what it cost its tenant."""

    gateway: str
    work_us: int
    kv_tokens: int
    tenant: str = ""
    until: float = 0.0  # of a grant
    service_us: int = 0


LATE = 1e9  # within a tenant, who cannot be on time goes after those who can
Key = tuple[int, int, float, str]


class Arbiter:
    """`max_running` and `kv_tokens` 0: unknown, they bound nothing. `step_s`: seconds of prompts that are computed
    together. `preempts`: what is computed of a prompt that is put aside is not lost."""

    def __init__(
        self,
        depth_s: float = GUESSED_DEPTH_S,
        max_running: int = 0,
        kv_tokens: int = 0,
        step_s: float = 0.0,
        *,
        preempts: bool = False,
    ) -> None:
        self._prompts = PromptLine()
        self.resize(depth_s, max_running, kv_tokens, step_s, preempts=preempts)
        self._linked: dict[str, int] = {}  # gateway -> its Links; a new one may overlap the old
        self._wants: dict[str, tuple[Key, Want]] = {}
        self._lines: dict[str, Want] = {}  # the last word of each gateway on who waits there
        self._granted: dict[tuple[str, int], _Booked] = {}
        self._next: dict[str, float] = {}  # gateways that were granted and have not said who is next: until when
        self._inside: dict[int, _Booked] = {}  # in flight
        self._granted_us = 0
        self._kv = 0  # of prompts and grants
        self._number = 0
        self._kv_used = 0
        self._computing = False
        self._turns = Turns()
        self._holdings = Holdings()

    def resize(
        self, depth_s: float, max_running: int, kv_tokens: int, step_s: float = 0.0, *, preempts: bool = False
    ) -> None:
        """What is known of the instance now."""
        self._depth_us = round(depth_s * US)
        self._prompts.step_us = round(step_s * US)
        self._prompts.preempts = preempts
        self._max_running = max_running
        self._kv_tokens = kv_tokens
        self._whole = Size(max_running, kv_tokens)

    # -- gateways ---------------------------------------------------------------------------------------------------

    def joined(self, gateway: str) -> None:
        self._linked[gateway] = self._linked.get(gateway, 0) + 1

    def left(self, gateway: str) -> None:
        """Its Link is over: what it wanted and was granted is void. What it has in flight ends by itself."""
        self._linked[gateway] -= 1
        if self._linked[gateway]:
            return
        del self._linked[gateway]
        self._unwant(gateway)
        self._lines.pop(gateway, None)
        self._next.pop(gateway, None)
        for held in [held for held in self._granted if held[0] == gateway]:
            self._void(held)

    def want(self, gateway: str, want: Want, now: float) -> None:
        """Replaces what the gateway announced before; ticket 0: nobody waits there."""
        if gateway not in self._linked:
            return
        self._lines[gateway] = want
        self._next.pop(gateway, None)
        if not want.ticket or (gateway, want.ticket) in self._granted:
            self._unwant(gateway)
            return
        self._turns.came(want.tenant)
        self._holdings.see(want.tenant)
        self._unwant(gateway)
        score = (want.work_us + want.bias_us) / US + AGING * (now - want.age_s) + (LATE if want.late else 0.0)
        self._wants[gateway] = (want.rank, -want.priority, score, gateway), want

    def decline(self, gateway: str, ticket: int) -> None:
        """The gateway has no use for its grant."""
        booked = self._granted.get((gateway, ticket))
        if booked is not None:
            self._void((gateway, ticket))
            self._turns.served(booked.tenant, -booked.service_us / US)

    def grants(self, now: float) -> list[Grant]:
        """Hands out what room there is. To be called after anything that may have made some, and when `due` says.

        Who comes after the best of a gateway may be better than the best of another: the next grant waits until that
        gateway has said who it is, for as long at most as what was granted keeps the instance busy."""
        for held in [held for held, booked in self._granted.items() if booked.until <= now]:
            self._void(held)
        self._next = {gateway: until for gateway, until in self._next.items() if until > now}
        found: list[Grant] = []
        content: set[str] = set()  # tenants that have all the room they may have
        while not self._next and (gateway := self._first(content, now)) is not None:
            want = self._wants[gateway][1]
            need = want.kv_tokens + want.spare_tokens
            rank = overtakes(want)
            if not self._fits(need, now, want.work_us, rank):
                break
            if not self._fits(need, now, want.work_us, rank, want.tenant):
                content.add(want.tenant)
                continue
            self._turns.served(want.tenant, want.service_us / US)
            self._unwant(gateway)
            until = now + EXPIRY_S
            booked = _Booked(gateway, want.work_us, want.kv_tokens, want.tenant, until, want.service_us)
            self._granted[gateway, want.ticket] = booked
            self._hold(booked, now)
            self._granted_us += want.work_us
            self._kv += want.kv_tokens
            if len(self._linked) > 1 and want.work_us:
                self._next[gateway] = now + min(want.work_us / US, EXPIRY_S)
            found.append(Grant(gateway, want.ticket))
        return found

    def _first(self, but: Container[str], now: float) -> str | None:
        """Each tenant's best want by its key; of these, the one of who has, and was given, less."""
        heads: dict[str, tuple[Key, Want]] = {}
        for entry in self._wants.values():
            tenant = entry[1].tenant
            if tenant not in but and (tenant not in heads or entry[0] < heads[tenant][0]):
                heads[tenant] = entry
        if len(heads) < 2:
            return next((key[-1] for key, _ in heads.values()), None)
        ahead = self._turns.ahead()
        beyond = self._holdings.beyond(self._whole, now)

        def between(entry: tuple[Key, Want]) -> tuple[int, bool, float, str]:
            want = entry[1]
            score = (want.work_us + want.bias_us) / US + FAIRNESS * ahead[want.tenant] + (LATE_S if want.late else 0.0)
            return want.rank, want.tenant in beyond, score, entry[0][-1]

        return min(heads.values(), key=between)[0][-1]

    def _unwant(self, gateway: str) -> None:
        if gateway in self._wants:
            self._turns.left(self._wants.pop(gateway)[1].tenant)

    # -- requests ---------------------------------------------------------------------------------------------------

    def arrive(
        self,
        gateway: str,
        now: float,
        work_us: int = 0,
        kv_tokens: int = 0,
        grant: int = 0,
        tenant: str = "",
        *,
        tokens: int = 0,
        patience_us: int = 0,
        rank: int = 0,
    ) -> tuple[int, float]:
        """(its number, 0), or (0, seconds of prompts queued) where it is refused: it has no grant, others wait or the
        room is taken. Nobody is refused who could not have asked. It may put others aside: see `orders`."""
        held = (gateway, grant)
        asks = gateway in self._linked and len(self._linked) > 1
        if grant and held in self._granted:
            self._void(held)
        elif asks and (self._wants or not self._fits(kv_tokens, now, work_us, rank, tenant)):
            return 0, self.wait_us(now) / US
        else:
            self._turns.served(tenant, work_us / US)
        self._number += 1
        self._prompts.add(Pending(self._number, gateway, work_us, patience_us, rank, tokens), now)
        self._inside[self._number] = booked = _Booked(gateway, 0, kv_tokens, tenant)
        self._hold(booked, now)
        self._kv += booked.kv_tokens
        return self._number, 0.0

    def computed(self, tokens: int, now: float) -> None:
        """The engine has ended a step that computed so many tokens of prompts."""
        self._prompts.compute(tokens, now)

    def started(self, number: int, now: float) -> None:
        """Its first token is out."""
        if self._prompts.remove(number, now, computed=True):
            self._kv -= self._inside[number].kv_tokens

    def ended(self, number: int, now: float) -> None:
        booked = self._inside.pop(number, None)
        if booked is not None:
            if self._prompts.remove(number, now, computed=False):
                self._kv -= booked.kv_tokens
            self._release(booked)

    def aside(self, number: int) -> bool:
        """Whether it has to wait for its turn."""
        return self._prompts.aside(number)

    def orders(self, now: float) -> Orders:
        """Which prompts are put aside, and which go on. To be called after `grants`."""
        return self._prompts.orders(now, self._depth_us, self._granted_us)

    # -- room -------------------------------------------------------------------------------------------------------

    def engine(self, kv_used_ratio: float | None, running: int | None) -> None:
        """The engine's last word. None is unknown."""
        self._kv_used = round((kv_used_ratio or 0.0) * self._kv_tokens)
        self._computing = bool(running)

    def wait_us(self, now: float, work_us: int = 0, rank: int = 0) -> int:
        """Prompts queued, less what the first step of them has done since it began, and what is granted. `work_us`: of
        a newcomer, who does not wait for those whom it overtakes."""
        return self._prompts.left(now, work_us, rank) + self._granted_us

    def due(self, now: float) -> float | None:
        """When time alone will have made room, or ended a grant. None: only an event can."""
        found = [booked.until for booked in self._granted.values()]
        again = self._prompts.due(self._depth_us, self._granted_us)
        if again is not None and again > now:
            found.append(again)
        if self._wants:
            at = max(self._next.values(), default=now)
            excess = min(self.wait_us(now, want.work_us, overtakes(want)) for _, want in self._wants.values())
            excess -= self._depth_us
            if excess > 0:
                more = self._prompts.head() - self._prompts.done(now)  # that time alone does
                at = max(at, now + (excess + 1) / US) if excess <= more else now
            if at > now:
                found.append(at)
        return min(found, default=None)

    def others(self, gateway: str, now: float) -> Others:
        """What this gateway cannot know by itself."""
        own = self._prompts.of(gateway)
        own += sum(booked.work_us for (name, _), booked in self._granted.items() if name == gateway)
        head = self._prompts.first
        done = min(self._prompts.done(now), head.work) if head is not None and head.gateway != gateway else 0
        line = [0] * (SIZES + 1)
        waiting = 0
        for name, want in self._lines.items():
            if name != gateway:
                waiting += want.waiting
                for size, ms in enumerate(want.line_ms[: SIZES + 1]):
                    line[size] += ms
        while line and not line[-1]:
            line.pop()
        work = self._prompts.work + self._granted_us - own - done
        beyond = frozenset(self._holdings.beyond(self._whole, now))
        return Others(len(self._linked), work, tuple(line), waiting, beyond)

    def queued_tokens(self, gateway: str | None = None) -> int:
        """Prompt tokens to be computed of this gateway's requests; None: of all."""
        return self._prompts.tokens_of(gateway)

    @property
    def hears(self) -> bool:
        """From the engine, what its steps compute."""
        return self._prompts.told

    @property
    def waiting(self) -> int:
        """How many gateways want something."""
        return len(self._wants)

    def in_use(self) -> Mapping[str, int]:
        """Every counter; all 0 where nothing is in flight, granted or linked."""
        return {
            "linked": len(self._linked),
            "wants": len(self._wants) + len(self._lines) + len(self._next),
            "granted": len(self._granted) + self._granted_us,
            "inside": len(self._inside) + len(self._prompts),
            "work": self._prompts.work,
            "kv": self._kv,
            "held": self._holdings.used(),
        }

    def _fits(self, kv_tokens: int, now: float, work_us: int, rank: int, tenant: str | None = None) -> bool:
        """`tenant`: beside what is kept for the others; None: for anybody."""
        busy = len(self._inside) + len(self._granted)
        depth_us, kept = self._depth_us, Size()
        if tenant is not None and tenant in self._holdings.beyond(self._whole, now):
            depth_us, kept = depth_us // SHALLOW, self._holdings.kept(tenant, self._whole, now)
        if self._max_running and busy + kept.slots >= self._max_running:
            return False
        used = self._kv_used + self._kv + kv_tokens + kept.tokens
        if self._kv_tokens and (busy or self._computing) and used > self._kv_tokens:
            return False
        return self.wait_us(now, work_us, rank) <= depth_us

    def _void(self, held: tuple[str, int]) -> None:
        booked = self._granted.pop(held)
        self._granted_us -= booked.work_us
        self._kv -= booked.kv_tokens
        self._release(booked)

    def _hold(self, booked: _Booked, now: float) -> None:
        self._holdings.take(booked.tenant, Size(1, booked.kv_tokens), now)

    def _release(self, booked: _Booked) -> None:
        self._holdings.give(booked.tenant, Size(1, booked.kv_tokens))
