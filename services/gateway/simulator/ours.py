"""The very router as a policy of the simulator, and the same one told nothing of the hardware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import isfinite
from typing import Literal

from registry.endpoint import Endpoint, Speed
from services.gateway.routing.admission import Bounds
from services.gateway.routing.decision import Ask, Decision, Effect, Lease
from services.gateway.routing.facts import Facts, LoadReport, Member, Outcome
from services.gateway.routing.policy import Policy
from services.gateway.routing.router import Router
from services.gateway.routing.scaling import Law
from services.gateway.simulator.fleet import Site

NUMBERS = tuple(item.name for item in fields(Speed) if item.name != "source")
# Peers let everybody wait in the instances for as long as it takes; that our own queue sheds nobody makes the means
# of the two comparable.
PATIENT = Bounds(max_requests=1 << 30, max_tokens=1 << 60, max_wait_s=1e9)
LAX_TTFT_S = 3600.0  # an objective that is not there
AGE_S = 60.0  # the gateway has been up for so long: the directory is settled


class Ours:
    """`blind`: every speed is the mean of the model's instances, and no time that was seen is told. `preempts`: shorter
    prompts overtake longer ones in the instances."""

    report_s: float | None = 0.0
    cache_events: Literal["never", "at_once", "with_report"] = "with_report"
    tick_s = 0.05
    asks = True

    def __init__(
        self,
        name: str = "infermesh",
        *,
        blind: bool = False,
        preempts: bool = True,
        bounds: Bounds = PATIENT,
        law: Law | None = None,
    ) -> None:
        """`law`: gateways say how many replicas each group of the site should have, by it."""
        self.name = name
        self.preempts = preempts
        self._law = law
        self._blind = blind
        self._bounds = bounds

    def gateway(self, site: Site, block_tokens: int, now: float) -> RouterGateway:
        known = replace(site, endpoints=blinded(site.endpoints)) if self._blind else site
        router = directory(known, now, self._bounds, self._law, preempts=self.preempts)
        return RouterGateway(router, self._blind, known.endpoints, preempts=self.preempts)


class RouterGateway:
    def __init__(
        self, router: Router, blind: bool = False, endpoints: Sequence[Endpoint] = (), *, preempts: bool = True
    ) -> None:
        self.router = router
        self._blind = blind
        self._preempts = preempts
        self._members = {endpoint.id: Member(endpoint) for endpoint in endpoints}

    def pick(self, facts: Facts, now: float, draw: float) -> Decision:
        return self.router.pick(facts, now, draw)

    def started(self, lease: Lease, now: float) -> list[Effect]:
        return self.router.started(lease, now)

    def release(self, lease: Lease, outcome: Outcome, now: float) -> list[Effect]:
        told = replace(outcome, ttft_s=0.0, duration_s=0.0) if self._blind else outcome
        return self.router.release(lease, told, now)

    def report(self, endpoint: Endpoint, load: LoadReport, now: float) -> list[Effect]:
        return self.router.report(endpoint.id, endpoint.incarnation, load, now)

    def cache(self, endpoint: Endpoint, stored: bool, chain: Sequence[int], now: float) -> list[Effect]:
        added, removed = (chain, ()) if stored else ((), chain)
        self.router.cached(endpoint.id, endpoint.incarnation, added, removed)
        return []

    def tick(self, now: float) -> list[Effect]:
        return self.router.tick(now)

    def granted(self, endpoint: Endpoint, ticket: int, now: float) -> list[Effect]:
        return self.router.granted(endpoint.id, endpoint.incarnation, ticket, now)

    def asks(self, now: float) -> list[Ask]:
        return self.router.asks(now)

    # -- a fleet that changes its size ------------------------------------------------------------------------------

    def joined(self, endpoint: Endpoint, now: float) -> list[Effect]:
        self._members[endpoint.id] = Member(endpoint)
        effects = self.router.update(self._members.values(), now)
        return effects + linked(self.router, endpoint, now, self._preempts)

    def draining(self, endpoint: Endpoint, now: float) -> list[Effect]:
        return self.router.draining(endpoint.id, endpoint.incarnation, now)

    def gone(self, endpoint: Endpoint, now: float) -> list[Effect]:
        del self._members[endpoint.id]
        effects = self.router.goodbye(endpoint.id, endpoint.incarnation, now)
        return effects + self.router.update(self._members.values(), now)

    def desired(self) -> dict[str, int]:
        """Replicas by group; a group without an opinion is not there."""
        return {view.name: view.desired for view in self.router.groups() if view.desired}


def directory(
    site: Site, now: float, bounds: Bounds = PATIENT, law: Law | None = None, *, preempts: bool = True
) -> Router:
    """A router that has known these instances for a while and is linked to all of them."""
    policy = Policy(
        ttft_s=min(site.ttft_s, LAX_TTFT_S),
        split=site.split,
        fallbacks=site.fallback,
        aliases=site.aliases,
        tpot_ms=site.tpot_ms if isfinite(site.tpot_ms) else 0.0,
        scale=site.scale if law else {},
        law=law or Law(),
    )
    router = Router(now - AGE_S, bounds, policy=policy)
    router.update([Member(endpoint) for endpoint in site.endpoints], now)
    for endpoint in site.endpoints:
        linked(router, endpoint, now, preempts)
    return router


def linked(router: Router, endpoint: Endpoint, now: float, preempts: bool) -> list[Effect]:
    """As our own services say in their hellos."""
    preempts = preempts and endpoint.kind == "llm"
    return router.linked(endpoint.id, endpoint.incarnation, now, grants=True, preempts=preempts)


def blinded(endpoints: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
    """The same instances with every number of their speed set to the mean over the model's."""
    groups: dict[tuple[str, str], list[Endpoint]] = {}
    for endpoint in endpoints:
        groups.setdefault((endpoint.kind, endpoint.model), []).append(endpoint)
    means = {key: _mean([endpoint.speed for endpoint in group]) for key, group in groups.items()}
    return tuple(replace(endpoint, speed=means[endpoint.kind, endpoint.model]) for endpoint in endpoints)


def _mean(speeds: Sequence[Speed]) -> Speed:
    values: dict[str, float] = {}
    for name in NUMBERS:
        known = [value for speed in speeds if (value := getattr(speed, name)) is not None]
        if known:
            values[name] = sum(known) / len(known)
    return Speed(**values, source="prior")
