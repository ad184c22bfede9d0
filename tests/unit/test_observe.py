"""What the gateway counts of an answer, by the operator's objective."""

from __future__ import annotations

import pytest

from services.gateway.observe import Observe, Report
from services.gateway.routing.facts import Facts


def verdicts(report: Report, **targets: float) -> dict[str, float]:
    observe = Observe(**targets)  # type: ignore[arg-type]
    observe.finished(report)
    return {
        sample.labels["verdict"]: sample.value
        for family in observe.registry.collect()
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
