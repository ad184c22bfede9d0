"""What the router is told: a request (`Facts`), the fleet (`Member`), an instance (`LoadReport`), an end (`Outcome`).

Times are seconds on one monotonic clock, chosen by the caller; work is in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from infermesh.errors import Reason
from registry.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Likeness:
    """What another instance must have in common with the one whose answer it is to continue. `engine`: where the kind
    of engine matters, too; `machine`: what decides about the last bit of every number. Empty = whatever it is."""

    model: str
    weights_version: str
    tokenizer_digest: str
    template_digest: str
    engine: str = ""
    machine: tuple[str, ...] = ()

    def fits(self, endpoint: Endpoint) -> bool:
        return (
            endpoint.model == self.model
            and endpoint.weights_version == self.weights_version
            and endpoint.tokenizer_digest == self.tokenizer_digest
            and endpoint.template_digest == self.template_digest
            and (not self.engine or endpoint.engine == self.engine)
            and (not self.machine or machine(endpoint) == self.machine)
        )


def machine(endpoint: Endpoint) -> tuple[str, ...]:
    hardware = endpoint.hardware
    parts = (endpoint.engine_version, hardware.device, hardware.tp, hardware.pp, endpoint.dtype, endpoint.quantization)
    return tuple(map(str, parts))


@dataclass(frozen=True, slots=True)
class Facts:
    """One request, as far as routing cares.

    `prompt_tokens` is exact when `counted`; else 0, and the router estimates it from `prompt_bytes`. `max_tokens` 0 =
    the caller set no bound. `slots` is what the request takes of an instance's `max_running` (0: tokenising). `since`
    is when it first asked, which a re-pick keeps. `deadline` 0 = none. `chain`: 64-bit hashes of the canonical prompt's
    blocks, each over everything before it; `chain_share`: the part of the prompt that one block is. `degrade`: whether
    another model may serve it under pressure, None = as its class says. `ttft_target_s` 0 = the operator's objective.
    `allowed`: names of models that the caller may use, empty = all.
    `alike`: it continues an answer that another instance began, None = it begins.
    """

    kind: str
    model: str
    prompt_bytes: int = 0
    prompt_tokens: int = 0
    counted: bool = False
    max_tokens: int = 0
    choices: int = 1
    slots: int = 1
    tenant: str = "default"
    klass: str = "standard"
    priority: int = 0
    features: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    document_id: str = ""
    session_id: str = ""
    chain: tuple[int, ...] = ()
    chain_share: float = 0.0
    deadline: float = 0.0
    since: float = 0.0
    degrade: bool | None = None
    ttft_target_s: float = 0.0
    allowed: tuple[str, ...] = ()
    alike: Likeness | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """One line of the directory. `passing`: the registry's opinion, one voice among several."""

    endpoint: Endpoint
    passing: bool = True


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A load frame. None is unknown. `own_*` and `seen_seq` speak of the gateway that reads it, `foreign_*` of the
    others; `gateways`: how many ask this instance before they send, 0 where it does not grant;
    `tenants_beyond`: who has more of it than others, over all gateways."""

    running: int | None = None
    waiting: int | None = None
    queued_tokens: int | None = None
    kv_used_ratio: float | None = None
    resident_tokens: int | None = None
    steps: int | None = None
    seen_seq: int = 0
    own_running: int = 0
    own_queued_tokens: int = 0
    gateways: int = 0
    foreign_work_us: int | None = None
    foreign_line_ms: tuple[int, ...] = ()
    foreign_waiting: int = 0
    tenants_beyond: frozenset[str] = frozenset()


class End(Enum):
    """How an attempt ended, as far as the health of its instance goes."""

    DONE = "done"
    REFUSED = "refused"  # the instance would not begin: full, draining, out of range, or the caller's own error
    CANCELLED = "cancelled"  # by the caller or its deadline
    FAILED = "failed"  # the instance's own error
    LOST = "lost"  # the connection broke
    MISTAKEN = "mistaken"  # who answered is not who was asked, or serves another model


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of an attempt. Token counts are the instance's own, 0 = not told (`cached_tokens`: None). `queued_s`:
    what an instance that refused had queued, by its own word; `preempted`: times that it put the prompt aside."""

    end: End
    reason: Reason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float = 0.0
    duration_s: float = 0.0
    cached_tokens: int | None = None
    queued_s: float = 0.0
    preempted: int = 0
