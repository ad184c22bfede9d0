"""A router with instances that answer, and requests for it: plain values."""

from __future__ import annotations

from registry.endpoint import Capacity, Endpoint, Speed
from services.gateway.routing.admission import Bounds
from services.gateway.routing.decision import Dispatch
from services.gateway.routing.facts import End, Facts, Member, Outcome
from services.gateway.routing.router import Router

OLD = 100.0  # a moment at which the gateway is no longer young
DONE = Outcome(End.DONE)


def endpoint(id: str, *, tps: float = 1000, step: float = 20, running: int = 0, **more: object) -> Endpoint:
    given = {"kind": "llm", "host": "127.0.0.1", "port": 9, "model": "m", "incarnation": 1, **more}
    given.setdefault("speed", Speed(prefill_tps=tps, step_ms=step))
    given.setdefault("capacity", Capacity(max_running=running))
    return Endpoint(id=id, **given)  # type: ignore[arg-type]


def router(*endpoints: Endpoint, bounds: Bounds | None = None, weights: dict[str, float] | None = None) -> Router:
    made = Router(0.0, bounds, weights)
    made.update([Member(e) for e in endpoints], 0.0)
    for e in endpoints:
        made.linked(e.id, e.incarnation, 0.0)
    return made


def facts(**given: object) -> Facts:
    return Facts(**{"kind": "llm", "model": "m", "prompt_tokens": 100, "max_tokens": 50, "since": OLD, **given})  # type: ignore[arg-type]


def pick(r: Router, now: float = OLD, draw: float = 0.0, **given: object) -> Dispatch:
    decision = r.pick(facts(**given), now, draw)
    assert isinstance(decision, Dispatch), decision
    return decision
