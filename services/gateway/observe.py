"""What leaves the gateway about its work: metrics, spans and one log line a request. Never a prompt."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from prometheus_client.exposition import choose_encoder

from infermesh.errors import MeshError, Reason
from services.gateway.entrance import Arrival
from services.gateway.metrics import Metrics
from services.gateway.report import Report
from services.gateway.tracing import Root, Tracing, Unkept

log = structlog.get_logger("request")


class Observe:
    """One a process. Without an OTLP endpoint, `trace` gives None and costs nothing. `ttft_s`, `tpot_ms` (0 = none):
    what answers are judged by."""

    def __init__(self, tracing: Tracing | None = None, *, ttft_s: float = 2.0, tpot_ms: float = 0.0) -> None:
        self._tracing = tracing
        self.metrics = Metrics(ttft_s, tpot_ms)
        if tracing is not None:
            tracing.export.on_drop = self.metrics.dropped.inc
        self.listeners: list[Callable[[Report], None]] = []  # called on the loop at the end of every request

    def trace(self, method: str, arrival: Arrival) -> Unkept | None:
        """The spans of a request."""
        return None if self._tracing is None else self._tracing.request(method, arrival)

    def root(self, arrival: Arrival) -> Root | None:
        """The server span of a request that the forwarder does not serve as it is."""
        return None if self._tracing is None else self._tracing.root(arrival)

    def finished(self, report: Report, error: BaseException | None = None) -> None:
        """Counts and logs the end of a request."""
        self.metrics.finished(report)
        fields = {
            "request_id": report.request_id,
            "method": report.method,
            "tenant": report.tenant,
            "model": report.model,
            "outcome": report.outcome,
            "instance": report.instance,
            "attempts": report.attempts,
            "ttft_ms": round(report.ttft_s * 1000, 1),
            "duration_ms": round(report.duration_s * 1000, 1),
            "prompt_tokens": report.prompt_tokens,
            "completion_tokens": report.completion_tokens,
            "cached_tokens": report.cached_tokens,
        }
        if report.record is not None and report.record.waited_s >= 0.001:
            fields["waited_ms"] = round(report.record.waited_s * 1000, 1)
        if report.trace_id:
            fields["trace_id"] = report.trace_id
        if report.resumes:
            fields["resumes"] = report.resumes
        if report.preempted:
            fields["preempted"] = report.preempted
        if isinstance(error, MeshError):
            fields["param"] = error.param
        log.info("request", **fields)
        for listen in self.listeners:
            listen(report)

    def refused(self, method: str, error: MeshError, arrival: Arrival, took_s: float = 0.0) -> None:
        """A request that a front turned away before the forwarder saw it, and how long ago it came in."""
        front, outcome = arrival.entrance.front if arrival.entrance else "", error.reason.value
        self.metrics.refused.labels(front, method, outcome).inc()
        root = self.root(arrival)
        if root is not None:
            root.ended(outcome, took_s)
        fields = {"front": front, "method": method, "outcome": outcome, "param": error.param}
        log.info("refused", **fields, request_id=arrival.request_id)

    def retried(self, reason: str) -> None:
        self.metrics.retries.labels(reason).inc()

    def resumed(
        self, request_id: str, reason: Reason, successor: str, tokens: int, pause_s: float, exact: bool
    ) -> None:
        """A stream goes on at `successor` after so many tokens."""
        self.metrics.resumes.labels(reason.value, str(exact).lower()).inc()
        self.metrics.pause.observe(pause_s)
        log.info(
            "stream resumed",
            request_id=request_id,
            reason=reason.value,
            instance=successor,
            tokens=tokens,
            pause_ms=round(pause_s * 1000, 1),
            exact=exact,
        )

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and their content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.metrics.registry), content_type

    async def close(self) -> None:
        if self._tracing is not None:
            await self._tracing.close()
