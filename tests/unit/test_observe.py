"""What the gateway counts: the objective, predictions against what came, and a bounded set of labels."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from services.gateway import metrics
from services.gateway.observe import Observe
from services.gateway.report import Report
from services.gateway.routing.decision import Record
from services.gateway.routing.facts import Facts


def verdicts(report: Report, **targets: float) -> dict[str, float]:
    observe = Observe(**targets)  # type: ignore[arg-type]
    observe.finished(report)
    return {
        sample.labels["verdict"]: sample.value
        for family in observe.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "infermesh_gateway_objective_total"
    }


@pytest.mark.parametrize(
    ("ttft_s", "duration_s", "tokens", "choices", "tpot_ms", "verdict"),
    [
        (1.9, 11.8, 100, 1, 100.0, "met"),  # 9.9 s for 99 intervals
        (2.1, 3.0, 100, 1, 100.0, "ttft"),
        (1.0, 12.0, 100, 1, 100.0, "tpot"),
        (1.0, 12.0, 100, 1, 0.0, "met"),  # no target
        (1.0, 12.0, 200, 2, 100.0, "tpot"),  # two answers at once make their tokens beside each other
        (1.0, 5.0, 1, 1, 100.0, "met"),  # one token has no interval
    ],
)
def test_an_answer_met_the_objective_or_missed_a_target(
    ttft_s: float, duration_s: float, tokens: int, choices: int, tpot_ms: float, verdict: str
) -> None:
    facts = Facts("llm", "m", choices=choices)
    times = {"ttft_s": ttft_s, "duration_s": duration_s, "completion_tokens": tokens}
    report = Report("r", "chat", "t", "m", "ok", "i", "m", 1, facts=facts, **times)  # type: ignore[arg-type]
    assert verdicts(report, ttft_s=2.0, tpot_ms=tpot_ms) == {verdict: 1.0}


def test_failures_and_other_methods_are_not_judged() -> None:
    assert verdicts(Report("r", "chat", "t", "m", "engine_failed")) == {}
    assert verdicts(Report("r", "embed", "t", "m", "ok", "i", "m", 1, 0.1, 0.1)) == {}


def values(observe: Observe, name: str) -> dict[tuple[str, ...], float]:
    """Every series of a metric, by the values of its labels."""
    samples = (sample for family in observe.metrics.registry.collect() for sample in family.samples)
    return {tuple(one.labels.values()): one.value for one in samples if one.name == f"infermesh_gateway_{name}"}


def answered(model: str = "m", instance: str = "i", **more: Any) -> Report:
    record = Record("llm", model, instance, "least_cost", cached_tokens=64, predicted_ttft_s=0.2, waited_s=0.5)
    numbers = {"ttft_s": 0.8, "duration_s": 1.8, "prompt_tokens": 100, "completion_tokens": 11, "cached_tokens": 48}
    return Report("r", "chat", "t", model, "ok", instance, model, 1, record=record, **(numbers | more))


def test_predictions_are_held_against_what_came() -> None:
    observe = Observe()
    observe.finished(answered())
    assert values(observe, "prefix_tokens_total") == {
        ("m", "i", "prompt"): 100,
        ("m", "i", "predicted"): 64,
        ("m", "i", "found"): 48,
    }
    assert values(observe, "ttft_prediction_ratio_sum") == {("m", "i"): pytest.approx(1.5)}, "0.3 s of its own, not 0.2"
    assert values(observe, "time_per_token_seconds_sum") == {("m", "i"): pytest.approx(0.1)}
    assert values(observe, "waited_seconds_sum") == {("m",): 0.5}
    observe.finished(dataclasses.replace(answered(), attempts=2))
    assert values(observe, "ttft_prediction_ratio_count") == {("m", "i"): 1}, (
        "the first attempt was predicted, not both"
    )


def test_another_model_that_serves_is_counted() -> None:
    observe = Observe()
    report = answered("small")
    assert report.record is not None
    observe.finished(dataclasses.replace(report, record=dataclasses.replace(report.record, degraded_from="large")))
    assert values(observe, "degrades_total") == {("large", "small"): 1}


def test_what_is_shed_names_its_model_and_what_nobody_serves_does_not() -> None:
    observe = Observe()
    for outcome, asked in (("queue_full", "m"), ("model_not_found", "x" * 300), ("invalid_argument", "y")):
        record = None if outcome == "invalid_argument" else Record("llm", asked)
        observe.finished(Report("r", "chat", "t", asked, outcome, record=record))
    assert set(values(observe, "requests_total")) == {
        ("chat", "m", "", "queue_full"),
        ("chat", "", "", "model_not_found"),
        ("chat", "", "", "invalid_argument"),
    }


def test_the_series_stay_few_whatever_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MODELS", 8)
    monkeypatch.setattr(metrics, "INSTANCES", 16)
    observe = Observe()
    for number in range(100):
        observe.finished(answered(f"model-{number}", f"pod-{number}"))
        observe.finished(answered("model-0", "stays"))
        observe.metrics.ejected(f"pod-{number}", "left")
    requests = values(observe, "requests_total")
    assert {labels[1] for labels in requests} <= {*(f"model-{n}" for n in range(8)), "other"}
    assert requests["chat", "model-0", "stays", "ok"] == 100
    assert len({labels[2] for labels in requests}) == 16 == len(values(observe, "ejections_total")) + 1
    assert len(values(observe, "ttft_seconds_count")) == 16
