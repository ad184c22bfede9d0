"""What leaves the gateway about its work: metrics and one log line a request (spans: tracing.py). Never a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from infermesh.errors import MeshError, Reason
from services.gateway.loop import WINDOW_S, HoldMeter
from services.gateway.routing.decision import Record
from services.gateway.routing.facts import Facts
from services.gateway.routing.groups import GroupView
from services.gateway.tracing import Root, Spans, Tracing

OK = "ok"
_TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
_DURATION = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
log = structlog.get_logger("request")


@dataclass(frozen=True, slots=True)
class Tried:
    """One decision for a request, and how what it began ended: `ok` or the word of a Reason."""

    record: Record
    outcome: str


@dataclass(frozen=True, slots=True)
class Report:
    """The end of one request. Times in seconds, 0 = never came; `outcome` is `ok` or the word of a Reason.

    `record` is the last decision; `tried` has every one, in order, retries and refusals included. `facts` is None where
    a check turned the request away.
    """

    request_id: str
    method: str
    tenant: str
    model: str
    outcome: str
    instance: str = ""
    served_model: str = ""
    attempts: int = 0
    ttft_s: float = 0.0
    duration_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    record: Record | None = None
    tried: tuple[Tried, ...] = ()
    facts: Facts | None = None
    resumes: int = 0
    trace_id: str = ""


class _Groups(Collector):
    """One series a group of the settings, however many instances come and go."""

    def __init__(self, read: Callable[[], Sequence[GroupView]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        views = [view for view in self._read() if view.desired]  # a gateway without an opinion has no series
        for name, text, of in (
            (
                "desired_replicas",
                "Instances that a group should have; of several gateways the highest counts.",
                "desired",
            ),
            ("replicas", "Instances that a group has.", "replicas"),
            ("group_use", "Part of what runs out first that is in use.", "use"),
        ):
            family = GaugeMetricFamily(f"infermesh_gateway_{name}", text, labels=("group",))
            for view in views:
                family.add_metric((view.name,), getattr(view, of))
            yield family


class Observe:
    """One a process. Without an OTLP endpoint, `trace` gives None and costs nothing. `ttft_s`, `tpot_ms` (0 = none):
    what answers are judged by."""

    def __init__(self, tracing: Tracing | None = None, *, ttft_s: float = 2.0, tpot_ms: float = 0.0) -> None:
        self._tracing = tracing
        self._target_s, self._target_ms = ttft_s, tpot_ms
        self.registry = CollectorRegistry()
        labels = ("method", "model", "instance", "outcome")
        name = "infermesh_gateway"
        of = self.registry
        self._requests = Counter(f"{name}_requests", "Requests that ended.", labels, registry=of)
        self._ttft = Histogram(
            f"{name}_ttft_seconds",
            "Time to the first event.",
            ("method", "model", "instance"),
            buckets=_TTFT,
            registry=of,
        )
        self._duration = Histogram(
            f"{name}_duration_seconds",
            "Whole requests.",
            ("method", "model", "instance"),
            buckets=_DURATION,
            registry=of,
        )
        self._tokens = Counter(f"{name}_tokens", "Tokens, by what they were.", ("model", "type"), registry=of)
        self._objective = Counter(
            f"{name}_objective", "Whole LLM answers: met, or the target they missed.", ("model", "verdict"), registry=of
        )
        self._retries = Counter(f"{name}_retries", "Attempts after the first.", ("reason",), registry=of)
        self._resumes = Counter(
            f"{name}_resumes", "Streams that went on at another instance.", ("reason", "exact"), registry=of
        )
        self._pause = Histogram(
            f"{name}_resume_pause_seconds", "From the loss of a stream to its next event.", buckets=_TTFT, registry=of
        )
        self._refused = Counter(
            f"{name}_refused", "Refused before forwarding.", ("front", "method", "outcome"), registry=of
        )
        self._ejections = Counter(f"{name}_ejections", "Instances taken out.", ("instance", "cause"), registry=of)
        self._abandoned = Counter(f"{name}_abandoned", "Calls cut to move.", ("instance",), registry=of)
        self._dropped = Counter(
            f"{name}_spans_dropped", "Spans that no collector took: it is away, slow, or refuses them.", registry=of
        )
        if tracing is not None:
            tracing.export.on_drop = self._dropped.inc
        self.in_flight = Gauge(f"{name}_in_flight", "Requests being served, waiting ones among them.", registry=of)
        self.waiting = Gauge(f"{name}_waiting", "Requests that wait for room.", registry=of)
        self._series: dict[tuple[str, ...], tuple[Counter, Histogram, Histogram]] = {}
        self.listeners: list[Callable[[Report], None]] = []  # called on the loop at the end of every request

    # -- requests ---------------------------------------------------------------------------------------------------

    def trace(self, method: str, request_id: str, trace: Mapping[str, str]) -> Spans | None:
        return None if self._tracing is None else self._tracing.request(method, request_id, trace)

    def root(self, name: str, request_id: str, trace: Mapping[str, str]) -> Root | None:
        """The span above the requests of one call."""
        return None if self._tracing is None else self._tracing.root(name, request_id, trace)

    def finished(self, report: Report, error: BaseException | None = None) -> None:
        """Counts and logs the end of a request."""
        requests, ttft, duration = self._of(report)
        requests.inc()
        duration.observe(report.duration_s)
        if report.ttft_s:
            ttft.observe(report.ttft_s)
        if report.outcome == OK and report.method in ("chat", "complete"):
            self._objective.labels(report.served_model, self._verdict(report)).inc()
        if report.prompt_tokens:
            self._tokens.labels(report.served_model, "prompt").inc(report.prompt_tokens)
        if report.completion_tokens:
            self._tokens.labels(report.served_model, "completion").inc(report.completion_tokens)
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
        if isinstance(error, MeshError):
            fields["param"] = error.param
        log.info("request", **fields)
        for listen in self.listeners:
            listen(report)

    def refused(self, front: str, method: str, error: MeshError, request_id: str) -> None:
        """A request that a front turned away before the forwarder saw it."""
        self._refused.labels(front, method, error.reason.value).inc()
        log.info(
            "refused", front=front, method=method, outcome=error.reason.value, param=error.param, request_id=request_id
        )

    def retried(self, reason: str) -> None:
        self._retries.labels(reason).inc()

    def resumed(
        self, request_id: str, reason: Reason, successor: str, tokens: int, pause_s: float, exact: bool
    ) -> None:
        """A stream goes on at `successor` after so many tokens."""
        self._resumes.labels(reason.value, str(exact).lower()).inc()
        self._pause.observe(pause_s)
        log.info(
            "stream resumed",
            request_id=request_id,
            reason=reason.value,
            instance=successor,
            tokens=tokens,
            pause_ms=round(pause_s * 1000, 1),
            exact=exact,
        )

    def ejected(self, instance: str, cause: str) -> None:
        """`cause`: a word of routing.health.Cause."""
        self._ejections.labels(instance, cause).inc()

    def abandoned(self, instance: str) -> None:
        self._abandoned.labels(instance).inc()

    def _verdict(self, report: Report) -> str:
        """met | ttft | tpot: the first target that the answer missed."""
        if report.ttft_s > self._target_s:
            return "ttft"
        intervals = report.completion_tokens / (report.facts.choices if report.facts else 1) - 1
        took_ms = 1000 * (report.duration_s - report.ttft_s)
        return "tpot" if self._target_ms and took_ms > intervals * self._target_ms > 0 else "met"

    def _of(self, report: Report) -> tuple[Counter, Histogram, Histogram]:
        """The series of a request. A model that nobody serves gets no series of its own: callers choose the names."""
        model = report.served_model
        key = (report.method, model, report.instance, report.outcome)
        found = self._series.get(key)
        if found is None:
            three = key[:3]
            found = (self._requests.labels(*key), self._ttft.labels(*three), self._duration.labels(*three))
            self._series[key] = found
        return found

    # -- the process ------------------------------------------------------------------------------------------------

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and their content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    def watch_loop(self, meter: HoldMeter) -> None:
        """Shows what the loop's meter measures."""
        for name, text, read in (
            ("hold", f"Longest turn of the event loop in the last {WINDOW_S:g} s.", lambda: meter.recent),
            ("hold_max", "Longest turn of the event loop since start.", lambda: meter.longest),
            ("hold_max_wall", "The same with what the machine took away meanwhile.", lambda: meter.longest_wall),
        ):
            Gauge(f"infermesh_gateway_loop_{name}_seconds", text, registry=self.registry).set_function(read)

    def watch_groups(self, read: Callable[[], Sequence[GroupView]]) -> None:
        """Shows the groups that are scaled, as they are whenever the metrics are read."""
        self.registry.register(_Groups(read))

    async def close(self) -> None:
        if self._tracing is not None:
            await self._tracing.close()
