"""Traces: what is read and refused, what is made up; fleets as instances; capacity; the picture."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest

from deploy.fleet import parse_fleet
from services.gateway.routing.cost import PRIOR_PREFILL_TPS
from services.gateway.simulator.arrivals import generate, parse_spec
from services.gateway.simulator.capacity import capacity
from services.gateway.simulator.fleet import site_of
from services.gateway.simulator.floor import mean_ttft_floor_s
from services.gateway.simulator.metrics import quantile
from services.gateway.simulator.picture import picture
from services.gateway.simulator.trace import TraceError, parse_trace

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "examples"
LINE = {"timestamp": 1000, "input_length": 1000, "output_length": 10, "hash_ids": [1, 2]}


def lines(*changes: dict[str, object]) -> list[str]:
    return [json.dumps({**LINE, **change}) for change in changes]


def test_a_trace_is_put_in_order_and_starts_at_zero() -> None:
    trace = parse_trace(lines({"timestamp": 3000}, {}, {"timestamp": 1500}))
    assert [request.arrival for request in trace.requests] == [0.0, 0.5, 2.0]
    assert [request.arrival for request in trace.at_rate(2).requests] == [0.0, 0.25, 1.0]
    assert [request.index for request in trace.requests] == [0, 1, 2]
    assert len(trace.first(2).requests) == 2


def test_chains_are_of_the_prefix_and_salted_by_tenant() -> None:
    one, same, longer, other, foreign = parse_trace(
        lines({}, {}, {"hash_ids": [1, 2, 3]}, {"hash_ids": [9, 2]}, {"tenant": "x"})
    ).requests
    assert one.chain == same.chain == longer.chain[:2]
    assert not set(one.chain) & set(other.chain) and not set(one.chain) & set(foreign.chain)
    assert all(0 <= link < 1 << 64 for link in longer.chain)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"input_length": 0}, "line 2: input_length 0 is not a number within 1"),
        ({"timestamp": "x"}, "line 2: timestamp 'x' is not a number"),
        ({"output_length": True}, "line 2: output_length True is not a number"),
        ({"hash_ids": "abc"}, "line 2: hash_ids must be a list of integers"),
        ({"kind": "image"}, "line 2: kind 'image' is not one of"),
        ({"degrade": "yes"}, "line 2: degrade 'yes' is not true or false"),
        ({"input_length": float("nan")}, "line 2: input_length nan is not a number"),
    ],
)
def test_a_bad_line_is_named(change: dict[str, object], told: str) -> None:
    with pytest.raises(TraceError, match=told):
        parse_trace(lines({}, change))


def test_what_is_no_trace_at_all() -> None:
    for text, told in (("", "no request"), ("[1]", "line 1: must be an object"), ("{}", "'timestamp' is missing")):
        with pytest.raises(TraceError, match=told):
            parse_trace([text])


@pytest.mark.parametrize("shape", ["poisson", "bursts", "square", "sine"])
def test_made_up_arrivals_keep_their_mean(shape: str) -> None:
    spec = parse_spec(f"requests=4000,rps=5,shape={shape},prompt=800,output=50,spread=0.5,period=20")
    made = generate(spec, Random(1))
    assert made == generate(spec, Random(1)) != generate(spec, Random(2))
    count = len(made.requests)
    assert count / made.requests[-1].arrival == pytest.approx(5, rel=0.12)
    assert sum(request.prompt for request in made.requests) / count == pytest.approx(800, rel=0.05)
    assert sum(request.output for request in made.requests) / count == pytest.approx(50, rel=0.05)


def test_a_square_wave_has_its_high_and_its_low() -> None:
    made = generate(parse_spec("requests=4000,rps=10,shape=square,swing=0.8,period=10"), Random(1))
    high = sum(1 for request in made.requests if request.arrival % 10 < 5)
    assert high / 4000 == pytest.approx(0.9, abs=0.02)


def test_prefixes_repeat_and_the_rest_does_not() -> None:
    made = generate(parse_spec("requests=300,prefixes=4,prefix=1024,prompt=3000"), Random(1))
    heads = {request.chain[:2] for request in made.requests}
    tails = [request.chain[2] for request in made.requests]
    assert len(heads) == 4 and len(set(tails)) == 300
    assert all(request.prompt > 1024 and len(request.chain) == -(-request.prompt // 512) for request in made.requests)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("rsp=3", "'rsp' is not one of"),
        ("rps=fast", "rps: 'fast' is not a number"),
        ("rps=0", "rps must be above 0"),
        ("shape=saw", "shape 'saw' is not one of"),
        ("degrade=2", "degrade must be within 0 .. 1"),
        ("rps=nan", "rps must be above 0"),
    ],
)
def test_a_bad_spec_is_named(spec: str, told: str) -> None:
    with pytest.raises(TraceError, match=told):
        parse_spec(spec)


def test_a_fleet_becomes_instances() -> None:
    site = site_of(parse_fleet((EXAMPLES / "mixed-72b.yaml").read_text()))
    assert site.remarks == ()
    assert site.models == {"llm": "qwen2.5-72b", "embedding": "bge-m3", "rerank": "bge-reranker-v2-m3"}
    assert site.fallback == {"qwen2.5-72b": "qwen-14b-int4"}
    found = {endpoint.id: endpoint for endpoint in site.endpoints}
    assert found["a800-1-a"].hardware.device == "A800-80G" and found["a800-1-a"].hardware.count == 4
    assert found["a800-1-a"].capacity.context_max < found["h20-1"].capacity.context_max
    assert found["p100-0"].tier == "fallback" and found["embed-0"].speed.tokens_per_s == 35_000


def test_what_a_fleet_does_not_tell_is_assumed_aloud() -> None:
    site = site_of(
        parse_fleet("{version: 1, models: [{id: m, kind: llm}], instances: [{id: a, model: m, engine: scripted}]}")
    )
    assert [line.partition(":")[0] for line in site.remarks] == ["routing.objective is absent", "a", "a"]
    assert site.endpoints[0].speed.prefill_tps == PRIOR_PREFILL_TPS and site.endpoints[0].speed.source == "prior"


def test_capacity_is_the_best_ones() -> None:
    asked: list[tuple[str, float]] = []

    def mean(name: str, rate: float) -> float:
        asked.append((name, rate))
        return 1.0 if rate < {"good": 3.7, "bad": 0.4}[name] else 11.0

    assert capacity(mean, ["bad", "good"]) == pytest.approx(3.7, rel=0.02)
    assert len(asked) == len(set(asked))
    assert capacity(mean, ["bad"]) == pytest.approx(0.4, rel=0.02)
    with pytest.raises(ValueError, match="idle fleet"):
        capacity(lambda name, rate: 99.0, ["good"])
    with pytest.raises(ValueError, match="too short"):
        capacity(lambda name, rate: 0.0, ["good"])


def test_the_floor_is_the_best_instance_with_everything_cached() -> None:
    site = site_of(parse_fleet((EXAMPLES / "unlike-cards.yaml").read_text()))
    trace = parse_trace(lines({"input_length": 1024}, {"input_length": 1024}, {"kind": "rerank"}))
    h100 = (1024 / 30_000 * (1 + 512 / 30_600), 1 / 30_000 * (1 + 1023.5 / 30_600))
    assert mean_ttft_floor_s(trace, site) == pytest.approx(sum(h100) / 2)
    assert mean_ttft_floor_s(parse_trace(lines({"model": "other"})), site) is None


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0, 0.5, 0.75, 1)] == [1.0, 2.0, 2.5, 3.0]


def test_the_picture_has_a_line_for_each_policy() -> None:
    told = [(0.5, {"ttft_mean_s": 1.0, "goodput_share": 1.0}), (0.9, {"ttft_mean_s": 40.0, "goodput_share": 0.5})]
    text = picture(
        "a & b", "load", {"one": told, "two": told[:1], "none": [(0.5, {"ttft_mean_s": None, "goodput_share": 0})]}
    )
    root = ElementTree.fromstring(text)
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 6
    assert {"one", "two", "a & b", "load"} <= {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
