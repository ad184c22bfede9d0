"""What a load test amounts to, and the texts that it sends."""

from __future__ import annotations

from random import Random

import pytest

from infermesh.cli.bench_drive import prompt_of
from infermesh.cli.bench_report import Answer, Run, summary
from services.gateway.simulator.arrivals import generate, parse_spec


def answered(due, ttft, tpot_ms=10.0, output=11, late=0.0, **more):
    first = due + ttft
    return Answer(due, due + late, first, first + (output - 1) * tpot_ms / 1000, 100, 50, output, "a", **more)


def test_times_count_from_when_a_request_was_due():
    slow = answered(1.0, ttft=3.0, late=0.001)
    said = summary(Run([answered(0.0, ttft=0.5), slow, Answer(2.0, 2.0, failed="queue_full")]), 2.0, 80.0)
    assert (said["requests"], said["completed"], said["failed"]) == (3, 2, {"queue_full": 1})
    assert (said["ttft_mean_s"], said["ttft_p99_s"]) == (1.75, pytest.approx(2.975))
    assert said["tpot_p50_ms"] == pytest.approx(10)
    assert said["span_s"] == pytest.approx(4.1) and said["qps"] == pytest.approx(2 / 4.1, abs=1e-6)
    assert said["goodput_share"] == pytest.approx(1 / 3, abs=1e-6), "a failed and a late answer are not good"
    assert (said["cache_hit_ratio"], said["instances"], said["remarks"]) == (0.5, {"a": 2}, [])


def test_a_client_that_is_late_says_so():
    said = summary(Run([answered(float(n), ttft=0.5, late=0.4) for n in range(10)]), 2.0, 80.0)
    assert said["sent_late_p99_s"] == pytest.approx(0.4) and "the client was up to 0.40 s late" in said["remarks"][0]
    said = summary(Run([Answer(0.0, failed="not_sent")]), 2.0, 80.0)
    assert said["completed"] == 0 and said["ttft_p50_s"] is None and "--max-in-flight" in said["remarks"][0]


def test_equal_beginnings_of_a_trace_are_equal_beginnings_of_texts():
    spec = parse_spec("requests=20,prompt=600,spread=0.1,prefixes=2,prefix=512,block=128")
    trace = generate(spec, Random(1))
    texts = [prompt_of(request, trace.block_tokens, 0) for request in trace.requests]
    shared = round(512 / 1.25) - 4
    beginnings = {tuple(text.split()[:shared]) for text in texts}
    assert len(beginnings) == 2 and len(set(texts)) == 20
    assert all(
        len(text.split()) == pytest.approx(request.prompt / 1.25, rel=0.02)
        for text, request in zip(texts, trace.requests, strict=True)
    )


def test_constant_arrivals_are_a_second_apart():
    trace = generate(parse_spec("requests=4,rps=1,shape=constant"), Random(0))
    assert [request.arrival for request in trace.requests] == [0, 1, 2, 3]
