"""OpenTelemetry spans of a request: `route`, and below it one span an attempt. Nothing is imported while off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from services.chassis import telemetry_names as names
from services.chassis.telemetry import Telemetry, process_resource
from services.gateway.routing.decision import TERMS, Lease, Record

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

SHOWN = 32  # candidates and rejected of one decision; a large fleet's would be most of a span
_OPERATIONS = {"chat": "Chat", "complete": "Complete", "embed": "Embed", "rerank": "Rerank"}


class Tracing:
    """Makes the spans of this gateway's requests. `ratio`: of the traces that begin here, as kept."""

    def __init__(self, endpoint: str, gateway_id: str, ratio: float = 1.0) -> None:
        self._telemetry = Telemetry(endpoint, process_resource("gateway", gateway_id), ratio)
        self._tracer = self._telemetry.tracer("infermesh.gateway")

    @property
    def export(self) -> Any:
        """What sends them: its counts, and whom it tells of losses."""
        return self._telemetry.export

    def request(self, method: str, request_id: str, trace: Mapping[str, str]) -> Spans:
        return Spans(self._tracer, method, request_id, trace)

    def root(self, name: str, request_id: str, trace: Mapping[str, str]) -> Root:
        return Root(self._tracer, name, {names.REQUEST_ID: request_id}, trace)

    async def close(self) -> None:
        await self._telemetry.close()


class Root:
    """A span with others below it: of a call that the gateway serves with several requests of its own."""

    def __init__(self, tracer: Tracer, name: str, attributes: Mapping[str, Any], trace: Mapping[str, str]) -> None:
        from opentelemetry import trace as api
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = api
        self._propagator = TraceContextTextMapPropagator()
        parent = self._propagator.extract(dict(trace))
        self.span = tracer.start_span(name, context=parent, kind=api.SpanKind.SERVER, attributes=attributes)
        self.context: Context = api.set_span_in_context(self.span)

    def headers(self, span: Span | None = None) -> dict[str, str]:
        """The trace context for whoever works below the span."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(span) if span is not None else self.context)
        return carrier

    def ended(self, outcome: str, failed: bool, span: Span | None = None) -> None:
        span = span or self.span
        if failed:
            span.set_attribute(names.ERROR_TYPE, outcome)
            span.set_status(self._api.StatusCode.ERROR, outcome)
        span.end()


class Spans:
    """The spans of one request."""

    def __init__(self, tracer: Tracer, method: str, request_id: str, trace: Mapping[str, str]) -> None:
        from opentelemetry.trace import SpanKind

        method = method.lower()
        operation = names.OPERATIONS.get(_OPERATIONS.get(method, method.capitalize()), method)
        attributes = {names.OPERATION: operation, names.REQUEST_ID: request_id}
        self._tracer = tracer
        self._root = Root(tracer, names.ROUTE, attributes, trace)
        self._route = self._root.span
        self._client = SpanKind.CLIENT
        self._attempt: Span | None = None
        self._decided = False
        self._on = self._route.is_recording()

    @property
    def trace_id(self) -> str:
        return f"{self._route.get_span_context().trace_id:032x}"

    def decided(self, record: Record) -> None:
        """The first decision is the route's own; those after a failed attempt, and refusals then, are its events."""
        if not self._on:
            return
        if record.degraded_from:
            to = {names.REQUEST_MODEL: record.degraded_from, names.MODEL_ID: record.model, names.REASON: record.reason}
            self._route.add_event(names.DEGRADE, to)
        if self._decided:
            self._route.add_event(names.DECISION, _decision(record))
            return
        self._decided = True
        model = record.degraded_from or record.model
        self._route.set_attributes({names.REQUEST_MODEL: model, **_decision(record)})

    def attempt(self, lease: Lease, number: int, model: str, greeted: bool) -> dict[str, str]:
        """Begins an attempt's span; returns the trace headers for its call. `greeted`: the Link to the instance is up,
        whose hello said the same id and life."""
        if not self._on:
            return self._root.headers()
        who: dict[str, Any] = {names.INSTANCE_ID: lease.instance_id, names.MODEL_ID: model}
        if greeted:
            who |= {names.VERIFIED: True, names.VERIFIED_BY: "link"}
        self._route.set_attributes({**who, names.ATTEMPTS: number})
        attributes = {
            **who,
            names.REQUEST_MODEL: lease.record.model,
            names.ATTEMPT_NUMBER: number,
            names.INCARNATION: f"{lease.incarnation:016x}",
        }
        self._attempt = self._tracer.start_span(names.ATTEMPT, self._root.context, self._client, attributes)
        return self._root.headers(self._attempt)

    def attempt_ended(
        self, outcome: str, failed: bool, verified: bool | None = None, ttft_s: float = 0.0, tokens: int = 0
    ) -> None:
        """`verified`: whether the answer came from whom it was asked of; None: no answer came."""
        span, self._attempt = self._attempt, None
        if span is None:
            return
        if verified is not None:
            said: dict[str, Any] = {names.VERIFIED: verified, names.VERIFIED_BY: "answer"}
            span.set_attributes(said)
            self._route.set_attributes(said)
        span.set_attribute(names.OUTPUT_TOKENS, tokens)
        if ttft_s:
            span.set_attribute(names.FIRST_CHUNK_S, ttft_s)
        self._root.ended(outcome, failed, span)

    def resumed(self, successor: str, reason: str, tokens: int, pause_s: float, exact: bool) -> None:
        """The stream goes on at `successor` after so many tokens."""
        attributes: dict[str, Any] = {
            names.INSTANCE_ID: successor,
            names.RESUME_REASON: reason,
            names.RESUME_TOKENS: tokens,
            names.RESUME_PAUSE: pause_s,
            names.RESUME_EXACT: exact,
        }
        self._route.add_event(names.RESUME, attributes)
        self._route.set_attribute(names.RESUME_EXACT, exact)

    def ended(
        self, outcome: str, failed: bool, prompt_tokens: int, completion_tokens: int, cached_tokens: int, model: str
    ) -> None:
        if self._on:
            used = {
                names.INPUT_TOKENS: prompt_tokens,
                names.OUTPUT_TOKENS: completion_tokens,
                names.CACHED_TOKENS: cached_tokens,
            }
            self._route.set_attributes(used)
            if model:
                self._route.set_attribute(names.RESPONSE_MODEL, model)
        self._root.ended(outcome, failed)


def _decision(record: Record) -> dict[str, Any]:
    """A decision as attributes. Lists are as long as `CANDIDATES`."""
    shown = record.candidates[:SHOWN]
    found: dict[str, Any] = {
        names.REASON: record.reason,
        names.CHOSEN: record.chosen,
        names.ESTIMATE: record.estimate_s,
        names.WAITED: record.waited_s,
        names.PREDICTED_TTFT: record.predicted_ttft_s,
        names.PREDICTED_CACHED: record.cached_tokens,
        names.PROMPT_TOKENS: record.prompt_tokens,
        names.UNEXAMINED: record.unexamined + len(record.candidates) - len(shown),
        names.REJECTED: [f"{id}={word}" for id, word in record.rejected[:SHOWN]],
        names.CANDIDATES: [one.id for one in shown],
        names.COSTS: [one.cost_s for one in shown],
        names.WEIGHTS: [one.weight for one in shown],
        names.CACHED: [one.cached_tokens for one in shown],
    }
    for index, term in enumerate(TERMS):
        found[f"{names.ROUTE_PREFIX}{term}_s"] = [one.seconds[index] for one in shown]
    if record.degraded_from:
        found[names.DEGRADED_FROM] = record.degraded_from
    return found
