"""Spans made once they are over, as the SDK's ReadableSpan.

The SDK's recording spans take a lock and check each value at every attribute, and are made also where nobody keeps
them. Here a trace that is not kept costs its id; the SDK's sampling, ids, resource and finished span stay what they are
(docs/decisions/0037-lean-spans.md). Trace contexts are W3C Trace Context, level 1.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

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


class Notes(Protocol):
    """What is known of a request that is over; its spans are made when there is a moment."""

    @property
    def spans(self) -> int:
        """How many it will have."""
        ...

    def made(self) -> Iterable[ReadableSpan]: ...


class Place:
    """Where a request stands: in its caller's trace, or at the beginning of one. `kept`: it is to have spans. `trace`
    and `above`, of whoever stands above, are hexadecimal; `state` is the caller's tracestate, as it came."""

    __slots__ = ("above", "kept", "remote", "state", "trace")

    def __init__(self, trace: str, above: str, *, kept: bool, remote: bool, state: str = "") -> None:
        self.trace = trace
        self.above = above
        self.kept = kept
        self.remote = remote
        self.state = state

    @property
    def headers(self) -> dict[str, str]:
        """The trace context for whoever works below, where no span of ours stands between."""
        return self.below(self.above)

    def below(self, span: str) -> dict[str, str]:
        """The same below a span of ours."""
        parent = f"00-{self.trace}-{span}-{'01' if self.kept else '00'}"
        return {"traceparent": parent, "tracestate": self.state} if self.state else {"traceparent": parent}


class Tracer:
    """The spans of one process. Traces that begin here are kept by `ratio`; others as their caller decided."""

    def __init__(
        self, sink: Callable[[ReadableSpan], None], resource: Resource, scope: InstrumentationScope, ratio: float
    ) -> None:
        self.sink = sink
        self._resource = resource
        self._scope = scope
        self._ids = RandomIdGenerator()
        self._bound = TraceIdRatioBased(ratio).bound

    def place(self, headers: Mapping[str, str]) -> Place:
        """By the headers of a request, whatever is in them."""
        parent = headers.get("traceparent")
        found = _PARENT.fullmatch(parent) if parent else None
        if found is None:
            id = self._ids.generate_trace_id()
            kept = id & TraceIdRatioBased.TRACE_ID_LIMIT < self._bound
            return Place(f"{id:032x}", "" if kept else self.new_id(), kept=kept, remote=False)
        kept = bool(int(found[3], 16) & TraceFlags.SAMPLED)
        return Place(found[1], found[2], kept=kept, remote=True, state=headers.get("tracestate", ""))

    def new_id(self) -> str:
        """Of a span."""
        return f"{self._ids.generate_span_id():016x}"

    def made(
        self,
        name: str,
        kind: SpanKind,
        place: Place,
        id: str,
        times: tuple[int, int],
        attributes: dict[str, Any],
        *,
        error: str = "",
        above: str = "",
        events: Sequence[Event] = (),
    ) -> ReadableSpan:
        """A span that is over. `times`: unix times in ns of its beginning and its end. `error`: the word of a Reason.
        `above`: the span of this process that it is below; else it is the first one here."""
        trace = int(place.trace, 16)
        state = TraceState.from_header([place.state]) if place.state else None
        parent = None
        if above or place.remote:
            parent = SpanContext(trace, int(above or place.above, 16), not above, _SAMPLED)
        status = _UNSET
        if error:
            attributes[names.ERROR_TYPE] = error
            status = Status(StatusCode.ERROR, error)
        return ReadableSpan(
            name=name,
            context=SpanContext(trace, int(id, 16), False, _SAMPLED, state),
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            events=events,
            kind=kind,
            status=status,
            start_time=times[0],
            end_time=times[1],
            instrumentation_scope=self._scope,
        )


class Span:
    """The first span of this process in a trace that is kept, under way. `attributes` may be added to until its end."""

    __slots__ = ("_id", "_name", "_place", "_tracer", "attributes", "begun_ns")

    def __init__(self, tracer: Tracer, name: str, place: Place, attributes: dict[str, Any]) -> None:
        self._tracer = tracer
        self._name = name
        self._place = place
        self._id = tracer.new_id()
        self.attributes = attributes
        self.begun_ns = time.time_ns()

    @property
    def headers(self) -> dict[str, str]:
        """The trace context for whoever works below this span."""
        return self._place.below(self._id)

    def end(self, error: str = "") -> None:
        """Hands it over, once. `error`: the word of a Reason."""
        times = (self.begun_ns, time.time_ns())
        made = self._tracer.made(
            self._name, SpanKind.SERVER, self._place, self._id, times, self.attributes, error=error
        )
        self._tracer.sink(made)
