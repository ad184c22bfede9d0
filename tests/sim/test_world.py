"""The simulated mesh as a whole: determinism, the wire, reports, several gateways, refusals, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from deploy.fleet import parse_fleet
from infermesh.cli import main
from registry.endpoint import Endpoint
from services.gateway.routing.decision import Effect
from services.gateway.routing.facts import Facts, LoadReport
from services.gateway.simulator.arrivals import generate, parse_spec
from services.gateway.simulator.fleet import Site, site_of
from services.gateway.simulator.metrics import summary
from services.gateway.simulator.peers import RoundRobin
from services.gateway.simulator.policies import NAMES, PeerPolicy, policy
from services.gateway.simulator.trace import Request, Trace
from services.gateway.simulator.world import Conditions, Run, simulate

FLEET = """
version: 1
models: [{id: m, kind: llm}, {id: v, kind: embedding, source: v}]
instances:
  - {id: fast, model: m, engine: scripted, kv_tokens: 60000, max_running: 32, context: [0, 16384],
     speed: {prefill_tps: 8000, prefill_doubling_ctx: 50000, step_ms: 10, kv_us_per_ktoken: 20}}
  - {id: slow, model: m, engine: scripted, kv_tokens: 60000, max_running: 32, context: [0, 16384],
     speed: {prefill_tps: 2000, prefill_doubling_ctx: 50000, step_ms: 30, kv_us_per_ktoken: 60}}
  - {id: long, model: m, engine: scripted, kv_tokens: 90000, max_running: 32, context: [0, 65536], tier: long-context,
     speed: {prefill_tps: 4000, prefill_doubling_ctx: 50000, step_ms: 10, kv_us_per_ktoken: 20}}
  - {id: vec, model: v, speed: {fixed_ms: 5, tokens_per_s: 10000}}
routing: {objective: {ttft_s: 2, tpot_ms: 80}}
"""
TRAFFIC = "requests=400,rps=3,prompt=2500,output=60,prefixes=12,prefix=1024"


def site() -> Site:
    return site_of(parse_fleet(FLEET))


def made(spec: str = TRAFFIC, seed: int = 3) -> Trace:
    return generate(parse_spec(spec), Random(seed))


def run(name: str, trace: Trace | None = None, seed: int = 1, **conditions: Any) -> Run:
    return simulate(trace or made(), site(), policy(name), Conditions(**conditions), Random(seed))


@pytest.mark.parametrize("name", NAMES)
def test_everybody_is_answered_once_and_equal_seeds_give_equal_runs(name: str) -> None:
    first = run(name)
    said = summary(first, site())
    assert said["completed"] == said["requests"] == 400 and said["shed"] == 0
    assert sum(place["requests"] for place in said["instances"].values()) == 400
    assert said["instances"]["vec"]["requests"] == 0  # embeddings' instances take no chat
    for job in first.jobs:
        assert job.request.arrival < job.first <= job.done
    assert summary(run(name), site()) == said


def test_another_seed_is_another_run() -> None:
    assert summary(run("power_of_two"), site()) != summary(run("power_of_two", seed=2), site())


@pytest.mark.parametrize("name", NAMES)
def test_long_prompts_run_where_they_fit_and_nowhere_else(name: str) -> None:
    trace = made("requests=200,rps=0.5,prompt=12000,output=20,spread=0.6")
    found = run(name, trace, estimate_error=0.3)
    assert sum(job.refusals for job in found.jobs) > 0  # estimates are wrong at times; the instance counts
    for job in found.jobs:
        if job.shed:
            assert job.request.prompt >= 65536
        elif job.request.prompt >= 16384:
            assert job.instance == "long"


def test_who_fits_nowhere_is_shed_and_the_rest_is_served() -> None:
    trace = Trace("t", (Request(0, 0.0, 70_000, 5), Request(1, 0.0, 700, 5)))
    for name in ("infermesh", "round_robin"):
        said = summary(run(name, trace), site())
        assert (said["completed"], said["shed"], said["goodput_share"]) == (1, 1, 0.5)


def test_one_request_by_hand() -> None:
    trace = Trace("t", (Request(0, 0.0, 1000, 11),))
    only = replace(site(), endpoints=site().endpoints[:1])
    job = simulate(trace, only, policy("round_robin"), Conditions(network_s=0.25), Random(1)).jobs[0]
    # Two ways over the wire, the prompt at 8,000 tokens/s with attention, ten more steps at 10 ms + 20 ns a token.
    assert job.first == pytest.approx(0.5 + 1000 / 8000 * (1 + 500 / 50_000))
    assert job.done - job.first == pytest.approx(10 * 0.010 + 20e-9 * sum(range(1001, 1011)))


def test_kinds_have_their_own_instances() -> None:
    trace = Trace("t", tuple(Request(i, 0.0, 1000, 0, kind="embedding") for i in range(3)))
    for name in NAMES:
        jobs = run(name, trace, network_s=0.0).jobs
        assert [round(job.done, 6) for job in jobs] == [0.105, 0.21, 0.315]


class Listener(RoundRobin):
    """Writes down what instances say and when."""

    heard_at: list[tuple[float, str, LoadReport]]

    def heard(self, id: str, load: LoadReport, now: float) -> None:
        self.heard_at = getattr(self, "heard_at", [])
        self.heard_at.append((now, id, load))

    def tick(self, now: float) -> list[Effect]:
        return []


class Listening(PeerPolicy):
    """Keeps the gateways that it built."""


def listen(report_s: float, gateways: int, trace: Trace) -> list[Listener]:
    built: list[Listener] = []

    def build(name: str, site: Site, block_tokens: int, now: float) -> Listener:
        built.append(Listener(name, site, block_tokens, now))
        return built[-1]

    told = PeerPolicy("listener", build, report_s=report_s)  # type: ignore[arg-type]
    simulate(trace, site(), told, Conditions(gateways=gateways, network_s=0.01), Random(1))
    return built


def test_reports_come_at_their_interval_and_late() -> None:
    trace = Trace("t", (Request(0, 1.0, 8000, 100), Request(1, 8.0, 100, 1)))
    gateway = listen(0.0, 1, trace)[0]
    times = [(round(at - 0.01, 6), load) for at, id, load in gateway.heard_at if id == "fast"]
    busy = [at for at, load in times if load.running]
    # At work from 1.01 s on; told at once, then each 100 ms, a heartbeat a second when nothing happens.
    assert busy[0] == pytest.approx(1.01) and {round(b - a, 6) for a, b in pairwise(busy)} == {0.1}
    idle = [at for at, load in times if at > 4 and not load.running]
    assert {round(b - a, 6) for a, b in pairwise(idle[1:])} == {1.0}


def test_gateways_take_turns_and_hear_their_own_share() -> None:
    trace = made("requests=40,rps=40,prompt=3000,output=50")
    gateways = listen(0.05, 4, trace)
    assert [gateway._seq for gateway in gateways] == [10, 10, 10, 10]
    loads = [[load for _, id, load in gateway.heard_at if id == "slow"] for gateway in gateways]
    for shares in zip(*loads, strict=True):
        assert sum(load.own_running for load in shares) == (shares[0].running or 0) + (shares[0].waiting or 0)
        assert sum(load.own_queued_tokens for load in shares) == shares[0].queued_tokens
    assert max(load.seen_seq for load in loads[0]) <= 10


def test_a_gateway_never_knows_how_long_an_answer_will_be() -> None:
    facts = {name for name in Facts.__dataclass_fields__}
    assert not facts & {"output", "output_tokens", "output_length"}
    lengths = {job.facts.max_tokens for job in run("infermesh").jobs}
    assert lengths == {0}


def test_several_gateways_serve_everybody() -> None:
    for name in ("infermesh", "cache_aware", "kv_overlap_cost"):
        found = run(name, gateways=4)
        assert summary(found, site())["completed"] == 400
        assert {job.gateway for job in found.jobs} == {0, 1, 2, 3}


def test_a_run_that_would_never_end_is_cut() -> None:
    trace = Trace("t", tuple(Request(i, 0.0, 16_000, 1) for i in range(200)))
    said = summary(run("round_robin", trace, drain_s=20.0), site())
    assert 0 < said["completed"] < 200 and said["shed"] == 0


KEYS = {
    *("requests", "completed", "shed", "degraded", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_ms"),
    *("tpot_p99_ms", "e2e_p50_s", "e2e_p99_s", "goodput_rps", "goodput_share", "cache_hit_ratio", "instances"),
}


def test_the_command_prints_what_the_design_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet, trace = tmp_path / "fleet.yaml", tmp_path / "trace.jsonl"
    fleet.write_text(FLEET)
    lines = [
        {"timestamp": request.arrival * 1000, "input_length": request.prompt, "output_length": request.output}
        for request in made("requests=150,rps=3").requests
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    words = ["sim", "--trace", str(trace), "--fleet", str(fleet), "--policy", "infermesh,round_robin"]
    assert main([*words, "--rate", "2", "--seed", "7", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"trace", "fleet", "seed", "rate", "policies"}
    assert (said["seed"], said["rate"], list(said["policies"])) == (7, 2.0, ["infermesh", "round_robin"])
    assert set(said["policies"]["infermesh"]) == KEYS
    assert set(said["policies"]["infermesh"]["instances"]["fast"]) == {"requests", "busy_ratio", "cache_hit_ratio"}
    picture = tmp_path / "load.svg"
    assert main([*words, "--load", "0.5,1.1", "--plot", str(picture), "--gateways", "2"]) == 0
    shown = capsys.readouterr()
    assert "load 0.5 of" in shown.out and "load 1.1 of" in shown.out and "capacity:" in shown.err
    assert picture.read_text().count("<polyline") == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--generate", "rps=1"], "Missing option"),
        (["--fleet", "none.yaml", "--generate", "rps=1"], "--fleet none.yaml: No such file"),
        (["--fleet", "f"], "one of --trace and --generate"),
        (["--fleet", "f", "--generate", "rps=1", "--policy", "magic"], "--policy: magic is not one of all, infermesh"),
        (["--fleet", "f", "--generate", "rps=1", "--rate", "1", "--load", "1"], "exclude each other"),
        (["--fleet", "f", "--generate", "rps=1", "--rate", "0"], "each must be within"),
        (["--fleet", "f", "--generate", "rps=1", "--plot", "x.gif"], "only .svg"),
    ],
)
def test_bad_usage_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", *words]) == 2
    shown = capsys.readouterr()
    assert told in shown.err and not shown.out


def test_instances_of_the_mesh_are_those_of_the_file() -> None:
    ids: list[Endpoint] = list(site().endpoints)
    assert [endpoint.id for endpoint in ids] == ["fast", "slow", "long", "vec"]
