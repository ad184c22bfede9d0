"""The plan's promise, held against a simulation, which comes as an argument: the planner imports no gateway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deploy.planner.placed import Plan
from deploy.planner.wanted import wanted_of

SHOWN = (
    *("requests", "completed", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "tpot_p99_ms"),
    *("goodput_rps", "goodput_share"),
)
GOOD = 0.9  # share of requests within the objective that counts as held


def traffic_spec(plan: Plan, requests: int) -> str | None:
    """The short requests of the file as made-up traffic (`sim --generate`): Poisson arrivals, no shared prefixes,
    lengths around the means. None where the file tells no traffic or nothing serves an LLM."""
    if plan.fleet.traffic is None or not any(one.estimate.speed for one in plan.placed):
        return None
    demand = wanted_of(plan.fleet).short
    return (
        f"rps={demand.rate:g},requests={requests},prompt={demand.prompt:g},output={demand.output:g},spread=0.3,"
        "shape=poisson"
    )


def verdict(plan: Plan, simulate: Callable[[str], dict[str, Any]], requests: int) -> dict[str, Any] | None:
    """What `simulate(spec)` gives under `sim`'s names, whether the objective held, and the spec to repeat it."""
    spec = traffic_spec(plan, requests)
    if spec is None:
        return None
    said = simulate(spec)
    share = said["goodput_share"]
    return {"generate": spec, **{name: said[name] for name in SHOWN}, "holds": share is not None and share >= GOOD}
