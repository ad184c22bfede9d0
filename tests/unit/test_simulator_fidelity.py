"""A recorded trace against its simulation: what is called an error, and what a change."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from deploy.fleet import parse_fleet
from infermesh.cli.sim_report import compare, print_run, recorded_elsewhere
from services.gateway.simulator.fidelity import error, measured
from services.gateway.simulator.fleet import site_of
from services.gateway.simulator.policies import policy
from services.gateway.simulator.sweep import Sweep
from services.gateway.simulator.trace import Trace, TraceError, parse_trace
from services.gateway.simulator.world import Conditions, Run, simulate

FLEET = """
version: 1
models: [{id: m, kind: llm}]
instances:
  - {id: a, model: m, engine: scripted, kv_tokens: 100000, max_running: 8,
     speed: {prefill_tps: 1000, prefill_doubling_ctx: 1000000, step_ms: 10, kv_us_per_ktoken: 0}}
"""
LINE = {"timestamp": 0, "input_length": 1000, "output_length": 11, "hash_ids": []}


def trace_of(*changes: dict[str, Any]) -> Trace:
    return parse_trace(
        json.dumps({**LINE, "timestamp": 60_000 * number, "outcome": "ok", "instance": "a", **change})
        for number, change in enumerate(changes)
    )


def run(trace: Trace) -> Run:
    site = site_of(parse_fleet(FLEET))
    return simulate(trace, site, policy("infermesh"), Conditions(), Random(1))


def test_the_error_is_simulated_over_measured() -> None:
    """An idle instance takes 1 s for the prompt and 10 steps of 10 ms for the rest: 1.0 s and 1.1 s."""
    trace = trace_of(
        {"ttft_ms": 2000, "e2e_ms": 2200},
        {"ttft_ms": 2000, "e2e_ms": 2200, "instance": "b"},
        {"ttft_ms": 0, "outcome": "queue_full"},
        {"ttft_ms": 9000, "e2e_ms": 9999, "outcome": "cancelled"},
    )
    found = error(run(trace))
    assert found is not None
    for name in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "e2e_p50_s", "e2e_p99_s"):
        assert found[name] == pytest.approx(-0.5, abs=0.02), (name, found)
    assert (found["requests"], found["same_instance"]) == (2, 0.5)
    assert found["ttft_apart_s"] == pytest.approx(1.0, abs=0.03)
    told = measured(trace)
    assert told is not None
    assert (told["requests"], told["completed"], told["ttft_p99_s"], told["instances"]) == (4, 2, 2.0, {"a": 1, "b": 1})


def test_a_trace_that_measured_nothing_has_no_error() -> None:
    plain = parse_trace([json.dumps(LINE)])
    assert measured(plain) is None and error(run(plain)) is None
    shed = trace_of({"outcome": "queue_full"})
    assert error(run(shed)) is None and (measured(shed) or {})["completed"] == 0


def test_blocks_are_as_large_as_the_lines_say_on_average() -> None:
    sizes = [
        json.dumps({**LINE, "hash_ids": [1] * count, "block_tokens": size}) for count, size in ((3, 100), (1, 140))
    ]
    assert parse_trace(sizes).block_tokens == 110
    without = json.dumps({**LINE, "block_tokens": 7})
    assert parse_trace([*sizes, without]).block_tokens == 110, "a line without blocks has no say"
    assert parse_trace([json.dumps({**LINE, "hash_ids": [1]})]).block_tokens == 512
    for change in (
        {"block_tokens": 0, "hash_ids": [1]},
        {"outcome": "ok", "ttft_ms": -1},
        {"outcome": "ok", "e2e_ms": "x"},
    ):
        with pytest.raises(TraceError, match=r"line 1: .* is not a number"):
            parse_trace([json.dumps({**LINE, **change})])


def test_only_the_recorded_rate_has_an_error() -> None:
    site = site_of(parse_fleet(FLEET))
    sweep = Sweep(trace_of({"ttft_ms": 2000, "e2e_ms": 2200}), site, Conditions(), Random)
    assert "error" in sweep.run("infermesh", 1.0) and "error" not in sweep.run("infermesh", 2.0)


def test_other_fleets_are_shown_as_changes_to_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    trace = trace_of({"ttft_ms": 2000, "e2e_ms": 2200})
    told = measured(trace)
    assert told is not None

    def one(fleet: str, text: str) -> dict[str, Any]:
        sweep = Sweep(trace, site_of(parse_fleet(text)), Conditions(), Random)
        said = sweep.run("infermesh", 1.0)
        return {"trace": "t", "fleet": fleet, "seed": 0, "rate": 1.0, "policies": {"infermesh": said}}

    runs = [one("today", FLEET), one("tomorrow", FLEET.replace("prefill_tps: 1000,", "prefill_tps: 2000,"))]
    assert recorded_elsewhere(runs[0], told) == "" and recorded_elsewhere(runs[0], {"instances": {"x": 1}}) == "x"
    compare(runs, told)
    today, tomorrow = (run["policies"]["infermesh"] for run in runs)
    assert runs[0]["measured"] is told and "measured" not in runs[1]
    assert today["error"]["ttft_mean_s"] == pytest.approx(-0.5, abs=0.02) and "change" not in today
    assert tomorrow["change"]["ttft_mean_s"] == pytest.approx(-0.5, abs=0.02) and "error" not in tomorrow
    for each in runs:
        print_run(each)
    out = capsys.readouterr().out
    assert "ERROR TTFT" in out and "CHANGE TTFT" in out and "A change smaller than the error means nothing" in out
    assert any(line.startswith("measured") and "2.00 s" in line for line in out.splitlines())
    fast = [{**one("today", FLEET), "rate": 2.0}]
    compare(fast, told)
    assert "measured" not in fast[0], "nobody measured what twice the traffic does"
    again = [one("today", FLEET)]
    compare(again, None)
    assert "error" not in again[0]["policies"]["infermesh"], "of another fleet's recording there is no error"
