"""OpenTelemetry spans of a request: `route`, and below it one span an attempt. Nothing is imported while off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from services.gateway.routing.decision import Lease

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

ROUTE = "route"
ATTEMPT = "attempt"
INSTANCE_ID = "infermesh.instance.id"
MODEL_ID = "infermesh.model.id"
OPERATION = "gen_ai.operation.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
ERROR_TYPE = "error.type"
_OPERATIONS = {"CHAT": "chat", "COMPLETE": "text_completion", "EMBED": "embeddings", "RERANK": "rerank"}


class Tracing:
    """Exports in the background in batches; a collector that is away loses spans and delays nobody."""

    def __init__(self, endpoint: str, gateway_id: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        plain = not endpoint.startswith("https://")
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=plain, timeout=5)
        resource = Resource.create({"service.name": "infermesh-gateway", "service.instance.id": gateway_id})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=4096))
        self._tracer = self._provider.get_tracer("infermesh.gateway")

    def request(self, method: str, trace: object) -> Spans:
        return Spans(self._tracer, method, trace if isinstance(trace, Mapping) else {})

    def close(self) -> None:
        self._provider.shutdown()


class Spans:
    """The spans of one request."""

    def __init__(self, tracer: Tracer, method: str, trace: Mapping[str, str]) -> None:
        from opentelemetry import trace as api
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = api
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = tracer
        attributes = {OPERATION: _OPERATIONS.get(method, method.lower())}
        parent = self._propagator.extract(dict(trace))
        self._route = tracer.start_span(ROUTE, context=parent, kind=api.SpanKind.SERVER, attributes=attributes)
        self._context = api.set_span_in_context(self._route)
        self._attempt: Span | None = None

    def attempt(self, lease: Lease, number: int, model: str) -> dict[str, str]:
        """Begins an attempt's span; returns the trace headers for its call."""
        record = lease.record
        attributes: dict[str, Any] = {
            INSTANCE_ID: lease.instance_id,
            MODEL_ID: model,
            REQUEST_MODEL: record.model,
            "infermesh.attempt": number,
        }
        self._route.set_attributes(
            {
                **attributes,
                "infermesh.route.reason": record.reason,
                "infermesh.route.candidates": [c.id for c in record.candidates],
                "infermesh.route.costs_s": [c.cost_s for c in record.candidates],
                "infermesh.route.rejected": [f"{id}={word}" for id, word in record.rejected],
                "infermesh.route.estimate_s": record.estimate_s,
                "infermesh.route.waited_s": record.waited_s,
            }
        )
        client = self._api.SpanKind.CLIENT
        self._attempt = self._tracer.start_span(ATTEMPT, context=self._context, kind=client, attributes=attributes)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(self._attempt))
        return carrier

    def attempt_ended(self, outcome: str, failed: bool) -> None:
        if self._attempt is not None:
            self._finish(self._attempt, outcome, failed)
            self._attempt = None

    def resumed(self, successor: str, reason: str, tokens: int, pause_s: float, exact: bool) -> None:
        """The stream goes on at `successor` after so many tokens."""
        attributes: dict[str, Any] = {
            INSTANCE_ID: successor,
            "infermesh.resume.reason": reason,
            "infermesh.resume.tokens": tokens,
            "infermesh.resume.pause_s": pause_s,
            "infermesh.resume.exact": exact,
        }
        self._route.add_event("resume", attributes)
        self._route.set_attribute("infermesh.resume.exact", exact)

    def ended(self, outcome: str, failed: bool, prompt_tokens: int, completion_tokens: int, model: str) -> None:
        self._route.set_attributes({INPUT_TOKENS: prompt_tokens, OUTPUT_TOKENS: completion_tokens})
        if model:
            self._route.set_attribute(RESPONSE_MODEL, model)
        self._finish(self._route, outcome, failed)

    def _finish(self, span: Span, outcome: str, failed: bool) -> None:
        if failed:
            span.set_attribute(ERROR_TYPE, outcome)
            span.set_status(self._api.StatusCode.ERROR, outcome)
        span.end()
