"""One tenant floods: what another one, with a tenth of its load, sees of it. Real router and arbiter, virtual time."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from random import Random

import pytest

from deploy.fleet import parse_fleet
from services.gateway.simulator.fleet import site_of
from services.gateway.simulator.policies import policy
from services.gateway.simulator.trace import Request, Trace
from services.gateway.simulator.world import Conditions, Run, simulate

FLOOD_S, END_S = 5.0, 20.0
Load = tuple[float, int, int]  # requests a second, tokens of prompt, of answer


def fleet(tps: int, running: int, kv: int) -> str:
    speed = f"speed: {{prefill_tps: {tps}, prefill_doubling_ctx: 50000, step_ms: 20, kv_us_per_ktoken: 20}}"
    instance = "  - {{id: e{i}, model: m, engine: scripted, kv_tokens: {kv}, max_running: {running}, {speed}}}\n"
    lines = (instance.format(i=i, kv=kv, running=running, speed=speed) for i in range(2))
    return "version: 1\nmodels: [{id: m, kind: llm}]\ninstances:\n" + "".join(lines)


def ran(text: str, gateways: int, calm: Load, greedy: Load | None) -> Run:
    chance, found = Random(3), []
    for tenant, load, start in (("calm", calm, 0.0), ("greedy", greedy, FLOOD_S)):
        if load is None:
            continue
        rate, prompt, output = load
        at = start + chance.expovariate(rate)
        while at < END_S:
            sizes = max(1, round(prompt * chance.uniform(0.7, 1.3))), max(1, round(output * chance.uniform(0.3, 1.7)))
            found.append(Request(0, at, *sizes, tenant=tenant, max_tokens=output))
            at += chance.expovariate(rate)
    found.sort(key=lambda request: request.arrival)
    trace = Trace("flood", tuple(replace(request, index=i) for i, request in enumerate(found)))
    return simulate(trace, site_of(parse_fleet(text)), policy("infermesh"), Conditions(gateways=gateways), Random(1))


def p95(run: Run) -> float:
    """Of the calm tenant's first tokens, from the flood on; whoever never got one counts as 1,000 s."""
    waits = sorted(
        job.first - job.request.arrival if job.first >= 0 else 1000.0
        for job in run.jobs
        if job.request.tenant == "calm" and job.request.arrival > FLOOD_S
    )
    return waits[ceil(0.95 * len(waits)) - 1]


SLOTS = fleet(100_000, 8, 1 << 20), (13.0, 10, 10), (130.0, 10, 10)  # twice what the slots do
PROMPTS = fleet(6000, 64, 400_000), (2.0, 500, 20), (40.0, 500, 20)  # twice what prompts can be computed
LONG = fleet(6000, 64, 400_000), (0.5, 4000, 50), (40.0, 500, 20)  # its own are eight times as long


@pytest.mark.parametrize("gateways", [1, 4])
@pytest.mark.parametrize(
    ("case", "most"), [(SLOTS, 3.0), (PROMPTS, 3.0), (LONG, 2.0)], ids=["slots", "prompts", "long prompts"]
)
def test_a_flood_does_not_hold_up_another_tenant(case: tuple[str, Load, Load], most: float, gateways: int) -> None:
    text, calm, greedy = case
    alone, beside = (ran(text, gateways, calm, other) for other in (None, greedy))
    assert p95(beside) <= most * p95(alone) + 0.1, f"{p95(beside):.3f} s, {p95(alone):.3f} s alone"


def test_what_nobody_else_wants_belongs_to_the_flood() -> None:
    """A tenant that is alone gets all of it, and beside a calm one nine tenths of what it would get alone."""
    text, calm, greedy = SLOTS

    def done(run: Run) -> int:
        return sum(0 <= job.done < END_S for job in run.jobs)

    alone, both = ran(text, 1, greedy, None), ran(text, 1, calm, greedy)
    served = done(both)
    assert served >= 0.85 * done(alone) * (END_S - FLOOD_S) / END_S, (served, done(alone))
