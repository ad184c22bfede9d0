"""How work spreads: a document that everybody asks for, and an operator's split and what it costs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from deploy.fleet import parse_fleet
from services.gateway.simulator.arrivals import generate, parse_spec
from services.gateway.simulator.fleet import Site, site_of
from services.gateway.simulator.policies import policy
from services.gateway.simulator.world import Conditions, Run, simulate

SPEED = "speed: {prefill_tps: 6000, prefill_doubling_ctx: 50000, step_ms: 20, kv_us_per_ktoken: 60}"
TWELVE = "version: 1\nmodels: [{id: m, kind: llm}]\ninstances:\n" + "".join(
    f"  - {{id: e{i:02}, model: m, engine: scripted, kv_tokens: 200000, max_running: 64, {SPEED}}}\n" for i in range(12)
)
TWO_CLASSES = """
version: 1
models: [{id: m, kind: llm}]
nodes:
  - {name: a, device: A800-80G, count: 2}
  - {name: h, device: H20-96G, count: 1}
instances:
  - {id: a-0, node: a, model: m, engine: scripted, kv_tokens: 300000, max_running: 64,
     speed: {prefill_tps: 4300, prefill_doubling_ctx: 55000, step_ms: 27, kv_us_per_ktoken: 45}}
  - {id: a-1, node: a, model: m, engine: scripted, kv_tokens: 300000, max_running: 64,
     speed: {prefill_tps: 4300, prefill_doubling_ctx: 55000, step_ms: 27, kv_us_per_ktoken: 45}}
  - {id: h-0, node: h, model: m, engine: scripted, kv_tokens: 900000, max_running: 256,
     speed: {prefill_tps: 4000, prefill_doubling_ctx: 55000, step_ms: 10, kv_us_per_ktoken: 12}}
routing: {split: {A800-80G: 6, H20-96G: 4}}
"""


TIERS = (
    Path(__file__).parents[2] / "deploy/examples/tiers.yaml"
).read_text()  # split 6:4, long prompts on the H20 only


def ran(fleet: str, spec: str, name: str = "infermesh") -> tuple[Run, Site]:
    site = site_of(parse_fleet(fleet))
    return simulate(generate(parse_spec(spec), Random(1)), site, policy(name), Conditions(), Random(1)), site


def mean_ttft(run: Run) -> float:
    return sum(job.first - job.request.arrival for job in run.jobs) / len(run.jobs)


@pytest.mark.parametrize(("rps", "fewest", "most"), [(1, 1, 2), (6, 2, 5), (12, 3, 8)])
def test_a_document_that_everybody_asks_for_is_kept_by_as_many_as_it_needs(rps: int, fewest: int, most: int) -> None:
    spec = f"requests=400,rps={rps},prompt=8600,output=100,spread=0.02,prefixes=1,prefix=8192"
    run, _ = ran(TWELVE, spec)
    served = Counter(job.instance for job in run.jobs)
    computed = Counter(job.instance for job in run.jobs if job.cached < 8192)
    assert fewest <= len(served) <= most, served
    assert sum(computed.values()) == len(served), "each of them computed it once"
    if rps > 1:
        assert max(served.values()) <= 0.6 * len(run.jobs), "no instance is burnt"
    others = (mean_ttft(ran(TWELVE, spec, name)[0]) for name in ("cache_aware", "scorer_sum"))
    assert mean_ttft(run) <= 1.05 * min(others)


def test_a_split_of_6_to_4_is_kept_to_the_percent_while_the_fleet_is_full() -> None:
    run, _ = ran(TWO_CLASSES, "requests=2500,rps=12,prompt=1500,output=150,spread=0.6")
    last = run.jobs[-1].request.arrival
    tokens: Counter[str] = Counter()
    for job in run.jobs:
        if last * 0.2 < job.sent < last:  # while requests wait
            tokens[job.instance[0]] += job.request.prompt + job.output
    assert abs(tokens["a"] / tokens.total() - 0.6) <= 0.01, tokens


@pytest.mark.parametrize("rps", [1, 2, 2.5])
def test_a_split_costs_next_to_nothing_while_the_fleet_keeps_up(rps: float) -> None:
    spec = f"requests=300,rps={rps},prompt=2000,output=200"
    free = TIERS.replace("  split: {A800-80G: 6, H20-96G: 4}", "")
    assert free != TIERS
    run, _ = ran(TIERS, spec)
    assert mean_ttft(run) <= 1.15 * mean_ttft(ran(free, spec)[0])
    assert mean_ttft(run) <= mean_ttft(ran(TIERS, spec, "least_request")[0])


def test_a_split_starves_nobody() -> None:
    run, _ = ran(TIERS, "requests=300,rps=4,prompt=2000,output=200")
    assert all(0 <= job.first < 300 for job in run.jobs), "the last one came after 75 s"
