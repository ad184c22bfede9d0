"""Spans as a request makes them: a dict and two times while it runs, the SDK's ReadableSpan once it is over.

The SDK's recording spans take a lock and check each value at every attribute, and are made also where nobody keeps
them. Here a trace that is not kept costs its id; the SDK's sampler, ids, resource and finished span stay what they are
(docs/decisions/0037-lean-spans.md). Trace contexts are W3C Trace Context, level 1.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from services.chassis import telemetry_names as names

_PARENT = re.compile(r"(?!ff|..-0{32}|.{36}0{16})[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)


@dataclass(slots=True)
class Place:
    """Where a request stands: in its caller's trace, or at the beginning of one. `kept`: it is to have spans."""

    trace_id: int
    parent: SpanContext | None
    kept: bool
    state: str  # the caller's tracestate, as it came
    span_id: int  # of whoever stands above, if it is not kept

    @property
    def headers(self) -> dict[str, str]:
        """The trace context for whoever works below, where no span of ours stands between."""
        flags = "01" if self.kept else "00"
        return _headers(f"00-{self.trace_id:032x}-{self.span_id:016x}-{flags}", self.state)


class Tracer:
    """The spans of one process. Traces that begin here are kept by `ratio`; others as their caller decided."""

    def __init__(
        self, sink: Callable[[ReadableSpan], None], resource: Resource, scope: InstrumentationScope, ratio: float
    ) -> None:
        self.sink = sink
        self.resource = resource
        self.scope = scope
        self.ids = RandomIdGenerator()
        self._sampler = TraceIdRatioBased(ratio)

    def place(self, headers: Mapping[str, str]) -> Place:
        """By the headers of a request, whatever is in them."""
        found = _PARENT.fullmatch(headers.get("traceparent", ""))
        if found is None:
            trace_id = self.ids.generate_trace_id()
            kept = self._sampler.should_sample(None, trace_id, "").decision.is_sampled()
            return Place(trace_id, None, kept, "", self.ids.generate_span_id())
        trace_id, span_id, kept = int(found[1], 16), int(found[2], 16), bool(int(found[3], 16) & TraceFlags.SAMPLED)
        parent = SpanContext(trace_id, span_id, True, _SAMPLED) if kept else None
        return Place(trace_id, parent, kept, headers.get("tracestate", ""), span_id)

    def begin(self, name: str, kind: SpanKind, place: Place, attributes: dict[str, Any]) -> Span:
        """The first span of this process in a trace that is kept. The attributes belong to it from then on."""
        state = TraceState.from_header([place.state]) if place.state else None
        context = SpanContext(place.trace_id, self.ids.generate_span_id(), False, _SAMPLED, state)
        return Span(self, name, kind, context, place.parent, attributes, place.state)


class Span:
    """A span under way. `attributes` may be added to until its end."""

    __slots__ = ("_context", "_events", "_kind", "_name", "_parent", "_state", "_tracer", "attributes", "begun_ns")

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        kind: SpanKind,
        context: SpanContext,
        parent: SpanContext | None,
        attributes: dict[str, Any],
        state: str,
    ) -> None:
        self._tracer = tracer
        self._name = name
        self._kind = kind
        self._context = context
        self._parent = parent
        self._state = state
        self._events: list[Event] = []
        self.attributes = attributes
        self.begun_ns = time.time_ns()

    @property
    def trace_id(self) -> str:
        return f"{self._context.trace_id:032x}"

    @property
    def headers(self) -> dict[str, str]:
        """The trace context for whoever works below this span."""
        context = self._context
        return _headers(f"00-{context.trace_id:032x}-{context.span_id:016x}-01", self._state)

    def child(self, name: str, kind: SpanKind, attributes: dict[str, Any]) -> Span:
        above = self._context
        span_id = self._tracer.ids.generate_span_id()
        context = SpanContext(above.trace_id, span_id, False, _SAMPLED, above.trace_state)
        return Span(self._tracer, name, kind, context, above, attributes, self._state)

    def event(self, name: str, attributes: dict[str, Any]) -> None:
        self._events.append(Event(name, attributes, time.time_ns()))

    def end(self, error: str = "") -> None:
        """Hands it over, once. `error`: the word of a Reason."""
        status = _UNSET
        if error:
            self.attributes[names.ERROR_TYPE] = error
            status = Status(StatusCode.ERROR, error)
        tracer = self._tracer
        tracer.sink(
            ReadableSpan(
                name=self._name,
                context=self._context,
                parent=self._parent,
                resource=tracer.resource,
                attributes=self.attributes,
                events=self._events,
                kind=self._kind,
                status=status,
                start_time=self.begun_ns,
                end_time=time.time_ns(),
                instrumentation_scope=tracer.scope,
            )
        )


def _headers(parent: str, state: str) -> dict[str, str]:
    return {"traceparent": parent, "tracestate": state} if state else {"traceparent": parent}
