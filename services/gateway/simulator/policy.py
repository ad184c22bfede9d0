"""What the simulated mesh asks of a gateway, whichever policy decides in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from registry.endpoint import Endpoint
from services.gateway.routing.decision import Ask, Decision, Effect, Lease
from services.gateway.routing.facts import Facts, LoadReport, Outcome
from services.gateway.simulator.fleet import Site


class Chance(Protocol):
    """The part of `random.Random` that is used; the caller brings it, seeded."""

    def random(self) -> float: ...

    def gauss(self, mu: float, sigma: float) -> float: ...


class Gateway(Protocol):
    """One gateway. It shares nothing with the others but what instances tell all of them."""

    def pick(self, facts: Facts, now: float, draw: float) -> Decision: ...

    def started(self, lease: Lease, now: float) -> list[Effect]: ...

    def release(self, lease: Lease, outcome: Outcome, now: float) -> list[Effect]: ...

    def report(self, endpoint: Endpoint, load: LoadReport, now: float) -> list[Effect]: ...

    def cache(self, endpoint: Endpoint, stored: bool, chain: Sequence[int], now: float) -> list[Effect]: ...

    def tick(self, now: float) -> list[Effect]: ...

    def granted(self, endpoint: Endpoint, ticket: int, now: float) -> list[Effect]: ...

    def asks(self, now: float) -> list[Ask]: ...


class Policy(Protocol):
    """Builds gateways. `report_s`: how often instances are heard (None: never; 0: at DESIGN §6's interval).
    `cache_events`: when they tell what enters and leaves their caches. `tick_s`: how often time alone is told, 0 never.
    `asks`: whether instances arbitrate between its gateways. `preempts`: whether shorter prompts overtake longer ones
    in them."""

    @property
    def name(self) -> str: ...

    @property
    def report_s(self) -> float | None: ...

    @property
    def cache_events(self) -> Literal["never", "at_once", "with_report"]: ...

    @property
    def tick_s(self) -> float: ...

    @property
    def asks(self) -> bool: ...

    @property
    def preempts(self) -> bool: ...

    def gateway(self, site: Site, block_tokens: int, now: float) -> Gateway: ...
