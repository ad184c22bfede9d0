"""What a load test amounts to, under the names of `sim --json`. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.gateway.simulator.metrics import latencies, quantile, rounded

LATE_S = 0.05  # by which the client may miss the time at which a request should go out


@dataclass(slots=True)
class Answer:
    """One request. Times [s] on the run's clock; `due`: when it should have gone out, from which everything counts."""

    due: float
    sent: float = -1.0
    first: float = -1.0
    last: float = -1.0
    prompt: int = 0
    cached: int = 0
    output: int = 0
    instance: str = ""
    failed: str = ""  # a reason

    @property
    def completed(self) -> bool:
        return not self.failed and self.first >= 0

    @property
    def ttft(self) -> float:
        return self.first - self.due

    @property
    def tpot_ms(self) -> float:
        return 1000 * (self.last - self.first) / (self.output - 1) if self.output > 1 else 0.0


@dataclass(slots=True)
class Run:
    answers: list[Answer] = field(default_factory=list)


def summary(run: Run, ttft_s: float, tpot_ms: float) -> dict[str, Any]:
    """Times of completed requests. Goodput: those that met both objectives; its share is of all requests."""
    done = [one for one in run.answers if one.completed]
    begin = min((one.due for one in run.answers), default=0.0)
    span = max((one.last for one in done), default=begin) - begin
    ttft = [one.ttft for one in done]
    tpot = [one.tpot_ms for one in done if one.output > 1]
    e2e = [one.last - one.due for one in done]
    good = sum(1 for one in done if one.ttft <= ttft_s and one.tpot_ms <= tpot_ms)
    late = quantile([one.sent - one.due for one in run.answers if one.sent >= 0], 0.99) or 0.0
    prompt = sum(one.prompt for one in done)

    def rate(count: float) -> float | None:
        return rounded(count / span if span > 0 else 0.0)

    return {
        "requests": len(run.answers),
        "completed": len(done),
        "failed": dict(Counter(one.failed for one in run.answers if one.failed)),
        "span_s": rounded(span),
        "qps": rate(len(done)),
        "output_tokens_per_s": rate(sum(one.output for one in done)),
        **latencies(ttft, tpot, e2e),
        "goodput_rps": rate(good),
        "goodput_share": rounded(good / len(run.answers) if run.answers else 0.0),
        "cache_hit_ratio": rounded(sum(one.cached for one in done) / prompt if prompt else 0.0),
        "instances": dict(sorted(Counter(one.instance for one in done if one.instance).items())),
        "sent_late_p99_s": rounded(max(0.0, late)),
        "remarks": _remarks(run.answers, late),
    }


def _remarks(answers: Sequence[Answer], late: float) -> list[str]:
    found = []
    if late > LATE_S:
        found.append(
            f"the client was up to {late:.2f} s late (99th percentile): it is saturated, and the times are partly "
            "its own; take a lower rate, or several clients"
        )
    if unsent := sum(one.failed == "not_sent" for one in answers):
        found.append(f"{unsent} requests were not sent: --max-in-flight was reached; they count as failed")
    return found
