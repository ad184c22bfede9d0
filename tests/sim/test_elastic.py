"""A fleet that follows a day's load, in virtual time: what it costs and what it misses, beside fixed sizes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from deploy.fleet import parse_fleet
from infermesh.cli import main
from services.gateway.routing.scaling import Law
from services.gateway.simulator.arrivals import generate, parse_spec
from services.gateway.simulator.elastic import Elapsed, Elastic, simulate_elastic, simulate_fixed
from services.gateway.simulator.fleet import Site, site_of
from services.gateway.simulator.metrics import summary
from services.gateway.simulator.ours import Ours
from services.gateway.simulator.policies import policy
from services.gateway.simulator.world import Conditions

FLEET = """
version: 1
models: [{id: chat, kind: llm}]
instances:
  - {id: chat, model: chat, engine: scripted, kv_tokens: 200000, max_running: 64, context: [0, 16384], min: 1, max: 8,
     speed: {prefill_tps: 3500, prefill_doubling_ctx: 50000, step_ms: 25, kv_us_per_ktoken: 40}}
routing: {objective: {ttft_s: 3, tpot_ms: 120}}
"""
# A day of half an hour: what takes minutes in a real one takes seconds here.
DAY = "requests=2200,rps=1.3,prompt=3000,output=100,spread=0.3,shape=day,swing=0.9,period=1800"
LAW = Law(smooth_s=10, up_s=5, cool_s=60)
START_S = 15.0


def site() -> Site:
    return site_of(parse_fleet(FLEET))


def grown(gateways: int = 1, requests: int = 0) -> Elapsed:
    trace = generate(parse_spec(DAY), Random(3))
    trace = trace.first(requests) if requests else trace
    return simulate_elastic(trace, site(), Ours(law=LAW), Conditions(gateways=gateways), Random(1), Elastic(START_S, 5))


@pytest.fixture(scope="module")
def day() -> Elapsed:
    return grown()


def fixed(count: int) -> Elapsed:
    trace = generate(parse_spec(DAY), Random(3))
    return simulate_fixed(trace, site(), Ours(), Conditions(), Random(1), {"chat": count})


def missed(elapsed: Elapsed) -> float:
    return 1 - float(summary(elapsed.run, site())["goodput_share"])


def test_it_costs_little_more_than_the_mean_and_misses_little_more_than_the_most(day: Elapsed) -> None:
    assert all(job.done >= 0 and not job.shed for job in day.run.jobs), "nobody is lost when an instance leaves"
    hours, most = day.instance_s, day.most()
    assert 4 <= most <= 8
    mean = round(hours / day.run.end)
    assert 2 <= mean < most
    largest, same = fixed(8), fixed(mean)
    assert hours < 0.65 * largest.instance_s
    assert missed(day) < missed(largest) + 0.04
    assert missed(day) < 0.5 * missed(same)


def test_who_leaves_has_finished_and_who_comes_takes_its_time(day: Elapsed) -> None:
    assert any(life.left >= 0 for life in day.lives) and any(life.joined > 0 for life in day.lives)
    ends = {life.endpoint.id: life.gone for life in day.lives if life.gone >= 0}
    for job in day.run.jobs:
        assert job.done <= ends.get(job.instance, day.run.end)
    for life in day.lives:
        assert life.joined in (0.0, -1.0) or life.joined == life.ordered + START_S
        assert life.gone < 0 or life.gone > life.left
    orders = [life.ordered for life in day.lives]
    leaves = sorted(life.left for life in day.lives if life.left >= 0)
    assert all(leave - max((o for o in orders if o <= leave), default=0.0) >= LAW.cool_s - 5 for leave in leaves)


def test_two_gateways_that_share_nothing_want_about_what_one_does() -> None:
    alone, two = grown(requests=900), grown(gateways=2, requests=900)
    assert two.instance_s == pytest.approx(alone.instance_s, rel=0.1)


def test_the_same_seed_gives_the_same_lives() -> None:
    first, again = grown(requests=250), grown(requests=250)
    assert [(life.ordered, life.left) for life in first.lives] == [(life.ordered, life.left) for life in again.lives]


def test_policies_of_peers_say_no_sizes() -> None:
    trace = generate(parse_spec(DAY), Random(3)).first(10)
    with pytest.raises(ValueError, match="cache_aware"):
        simulate_elastic(trace, site(), policy("cache_aware"), Conditions(), Random(1), Elastic(START_S))


def test_the_command_shows_it_beside_fixed_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET)
    words = ["--fleet", str(fleet), "--generate", DAY.replace("2200", "120"), "--autoscale", "15"]
    assert main(["sim", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["start_s"] == 15 and next(iter(found["autoscale"])) == "autoscaled"
    largest = found["autoscale"]["fixed at 8"]
    assert largest["instances_most"] == 8 and largest["requests"] == 120
    assert found["autoscale"]["autoscaled"]["instance_hours"] < largest["instance_hours"]
    assert main(["sim", *words]) == 0
    assert "INSTANCE-HOURS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policy", "cache_aware"], "the policy infermesh"),
        (["--rate", "1,2"], "one --rate"),
        (["--jobs", "2"], "not with"),
        (["--plot", "x.svg"], "not with"),
    ],
)
def test_what_it_does_not_take_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET)
    assert main(["sim", "--fleet", str(fleet), "--generate", "requests=5", "--autoscale", "5", *more]) == 2
    assert said in capsys.readouterr().err
    fleet.write_text(FLEET.replace("min: 1, max: 8,", ""))
    assert main(["sim", "--fleet", str(fleet), "--generate", "requests=5", "--autoscale", "5"]) == 2
    assert "no instance of the fleet has `max`" in capsys.readouterr().err
