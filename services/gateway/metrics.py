"""What /metrics says of the gateway's work. The set of labels is bounded, whatever callers and fleets call things."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.gateway.loop import WINDOW_S, HoldMeter
from services.gateway.report import OK, Report
from services.gateway.routing.groups import GroupView

MODELS, INSTANCES = 512, 2048  # that have series of their own at a time
OTHER = "other"
PREFIX = ("prompt", "predicted", "found")  # tokens of a prompt: all, thought to be in the cache, found there
_TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 1, 2.5)
_DURATION = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_RATIO = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4, 10)
_NAME = "infermesh_gateway"
_LLM = ("chat", "complete")


class Metrics:
    """One a process. `ttft_s`, `tpot_ms` (0 = none): what answers are judged by."""

    def __init__(self, ttft_s: float, tpot_ms: float) -> None:
        self._target_s, self._target_token_s = ttft_s, tpot_ms / 1000
        self.registry = CollectorRegistry()
        self._series: OrderedDict[str, dict[tuple[str, str, str], _Series]] = OrderedDict()  # by instance
        self._models: set[str] = set()
        served = ("method", "model", "instance")
        self.requests = self._counter("requests", "Requests that ended.", (*served, "outcome"))
        self.ttft = self._histogram("ttft_seconds", "Time to the first event.", served, _TTFT)
        self.duration = self._histogram("duration_seconds", "Whole requests.", served, _DURATION)
        self.token = self._histogram(
            "time_per_token_seconds", "From one token of an answer to the next, on average.", served[1:], _TOKEN
        )
        self.waited = self._histogram("waited_seconds", "In the queue, of those who were in it.", ("model",), _TTFT)
        self.predicted = self._histogram(
            "ttft_prediction_ratio", "Time to the first event, through what was predicted.", served[1:], _RATIO
        )
        self.prefix = self._counter(
            "prefix_tokens",
            "Prompt tokens of whole LLM answers: all, thought to be in the cache, and found there.",
            (*served[1:], "type"),
        )
        self.tokens = self._counter("tokens", "Tokens, by what they were.", ("model", "type"))
        self.objective = self._counter(
            "objective", "Whole LLM answers: met, or the target they missed.", ("model", "verdict")
        )
        self.degrades = self._counter("degrades", "Served by another model than was asked for.", ("model", "served"))
        self.retries = self._counter("retries", "Attempts after the first.", ("reason",))
        self.resumes = self._counter("resumes", "Streams that went on at another instance.", ("reason", "exact"))
        self.pause = self._histogram("resume_pause_seconds", "From the loss of a stream to its next event.", (), _TTFT)
        self.refused = self._counter("refused", "Refused before forwarding.", ("front", "method", "outcome"))
        self._ejections = self._counter("ejections", "Instances taken out.", ("instance", "cause"))
        self._abandoned = self._counter("abandoned", "Calls cut to move.", ("instance",))
        self.dropped = self._counter(
            "spans_dropped", "Spans that no collector took: it is away, slow, or refuses them.", ()
        )
        self.in_flight = self._gauge("in_flight", "Requests being served, waiting ones among them.")
        self.waiting = self._gauge("waiting", "Requests that wait for room.")

    def finished(self, report: Report) -> None:
        """Counts the end of a request."""
        model, ok = self._model(report.lane), report.outcome == OK
        series = self._of(report.method, model, report.instance, report.outcome)
        series.requests.inc()
        series.duration.observe(report.duration_s)
        if report.ttft_s:
            series.ttft.observe(report.ttft_s)
        if report.prompt_tokens:
            self.tokens.labels(model, "prompt").inc(report.prompt_tokens)
        if report.completion_tokens:
            self.tokens.labels(model, "completion").inc(report.completion_tokens)
        record = report.record
        if record is not None:
            if record.waited_s:
                self.waited.labels(model).observe(record.waited_s)
            if record.degraded_from:
                self.degrades.labels(self._model(record.degraded_from), model).inc()
        if not ok or report.method not in _LLM:
            return
        self.objective.labels(model, self._verdict(report)).inc()
        if report.token_s:
            series.token.observe(report.token_s)
        if record is None or report.attempts != 1:
            return  # what was predicted is of the first attempt, and of it alone
        if record.predicted_ttft_s > 0 and report.ttft_s:
            series.predicted.observe(max(0.0, report.ttft_s - record.waited_s) / record.predicted_ttft_s)
        if report.prompt_tokens:
            prompt, thought, found = series.prefix
            prompt.inc(report.prompt_tokens)
            thought.inc(record.cached_tokens)
            found.inc(report.cached_tokens)

    def ejected(self, instance: str, cause: str) -> None:
        """`cause`: a word of routing.health.Cause."""
        self._instance(instance)
        self._ejections.labels(instance, cause).inc()

    def abandoned(self, instance: str) -> None:
        self._instance(instance)
        self._abandoned.labels(instance).inc()

    def watch_loop(self, meter: HoldMeter) -> None:
        """Shows what the loop's meter measures."""
        for name, text, read in (
            ("hold", f"Longest turn of the event loop in the last {WINDOW_S:g} s.", lambda: meter.recent),
            ("hold_max", "Longest turn of the event loop since start.", lambda: meter.longest),
            ("hold_max_wall", "The same with what the machine took away meanwhile.", lambda: meter.longest_wall),
        ):
            self._gauge(f"loop_{name}_seconds", text).set_function(read)

    def watch_groups(self, read: Callable[[], Sequence[GroupView]]) -> None:
        """Shows the groups that are scaled, as they are whenever the metrics are read."""
        self.registry.register(_Groups(read))

    def _verdict(self, report: Report) -> str:
        """met | ttft | tpot: the first target that the answer missed."""
        if report.ttft_s > self._target_s:
            return "ttft"
        return "tpot" if 0 < self._target_token_s < report.token_s else "met"

    # -- what bounds the labels -------------------------------------------------------------------------------------

    def _model(self, name: str) -> str:
        if name in self._models or not name:
            return name
        if len(self._models) >= MODELS:
            return OTHER
        self._models.add(name)
        return name

    def _instance(self, id: str) -> dict[tuple[str, str, str], _Series]:
        """The series of an instance. Where instances come and go, those unheard of for longest lose theirs."""
        found = self._series.get(id)
        if found is None:
            found = self._series[id] = {}
            if len(self._series) > INSTANCES:
                gone, _ = self._series.popitem(last=False)
                for metric in (self.requests, self.ttft, self.duration, self.token, self.predicted, self.prefix):
                    metric.remove_by_labels({"instance": gone})
                self._ejections.remove_by_labels({"instance": gone})
                self._abandoned.remove_by_labels({"instance": gone})
        else:
            self._series.move_to_end(id)
        return found

    def _of(self, method: str, model: str, instance: str, outcome: str) -> _Series:
        of = self._instance(instance)
        found = of.get((method, model, outcome))
        if found is None:
            found = of[method, model, outcome] = _Series(self, method, model, instance, outcome)
        return found

    # -- how they are made ------------------------------------------------------------------------------------------

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"{_NAME}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{_NAME}_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(f"{_NAME}_{name}", text, labels, registry=self.registry, buckets=buckets)


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
            family = GaugeMetricFamily(f"{_NAME}_{name}", text, labels=("group",))
            for view in views:
                family.add_metric((view.name,), getattr(view, of))
            yield family


class _Series:
    """Those of one kind of request at one instance, found once."""

    __slots__ = ("duration", "predicted", "prefix", "requests", "token", "ttft")

    def __init__(self, metrics: Metrics, method: str, model: str, instance: str, outcome: str) -> None:
        self.requests = metrics.requests.labels(method, model, instance, outcome)
        self.ttft = metrics.ttft.labels(method, model, instance)
        self.duration = metrics.duration.labels(method, model, instance)
        if method in _LLM and outcome == OK:
            self.token = metrics.token.labels(model, instance)
            self.predicted = metrics.predicted.labels(model, instance)
            self.prefix = tuple(metrics.prefix.labels(model, instance, type) for type in PREFIX)
