"""OpenTelemetry spans of a request: `route`, and below it one span an attempt. Nothing is imported while off.

A request that the forwarder serves directly has `route` as its server span. One that a front serves with several
requests of its own, or turns away, has a server span named after its entrance; the routes are below it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.chassis import telemetry_names as names
from services.chassis.telemetry import Telemetry, process_resource
from services.gateway.entrance import Arrival, Entrance
from services.gateway.report import OK, Report
from services.gateway.routing.decision import Lease, Record

if TYPE_CHECKING:
    from services.chassis.telemetry_spans import Place, Span, Tracer


class Tracing:
    """Makes the spans of this gateway's requests. `ratio`: of the traces that begin here, as kept."""

    def __init__(self, endpoint: str, gateway_id: str, ratio: float = 1.0) -> None:
        from services.gateway.noted import Noted

        self._telemetry = Telemetry(endpoint, process_resource("gateway", gateway_id), ratio, "infermesh.gateway")
        self._tracer = self._telemetry.tracer
        self._noted = Noted

    @property
    def export(self) -> Any:
        """What sends them: its counts, and whom it tells of losses."""
        return self._telemetry.export

    def request(self, method: str, arrival: Arrival) -> Unkept:
        place = self._tracer.place(arrival.trace)
        return self._noted(self._tracer, self.export.note, place, method, arrival) if place.kept else Unkept(place)

    def root(self, arrival: Arrival) -> Root | None:
        return Root(self._tracer, arrival, arrival.entrance) if arrival.entrance is not None else None

    async def close(self) -> None:
        await self._telemetry.close()


class Root:
    """The server span of a request that a front does not simply hand on."""

    def __init__(self, tracer: Tracer, arrival: Arrival, entrance: Entrance) -> None:
        from services.chassis.telemetry_spans import Span

        self._entrance = entrance
        self._span: Span | None = None
        self._place = place = tracer.place(arrival.trace)
        if place.kept:
            attributes = {**entrance.attributes, names.REQUEST_ID: arrival.request_id}
            self._span = Span(tracer, entrance.title, place, attributes)

    @property
    def headers(self) -> dict[str, str]:
        """The trace context for what is below it."""
        return self._place.headers if self._span is None else self._span.headers

    def ended(self, outcome: str, took_s: float = 0.0) -> None:
        """`took_s`: how long ago it began, where that is longer than the span is there."""
        span = self._span
        if span is not None:
            span.begun_ns -= round(took_s * 1e9)
            span.attributes |= self._entrance.status(outcome)
            span.end("" if outcome == OK else outcome)


class Unkept:
    """What the forwarder tells of a request, where its trace is not kept."""

    __slots__ = ("place",)

    def __init__(self, place: Place) -> None:
        self.place = place

    @property
    def trace_id(self) -> str:
        return self.place.trace

    def decided(self, record: Record) -> None:
        """A decision for it."""

    def attempt(self, lease: Lease, number: int, model: str, greeted: bool) -> dict[str, str]:
        """An attempt begins; returns the trace headers for its call. `greeted`: the Link to the instance is up, whose
        hello said the same id and life."""
        return self.place.headers

    def attempt_ended(self, outcome: str, verified: bool | None, ttft_s: float, tokens: int) -> None:
        """`verified`: whether the answer came from whom it was asked of; None: no answer came."""

    def resumed(self, successor: str, reason: str, tokens: int, pause_s: float, exact: bool) -> None:
        """The stream goes on at `successor` after so many tokens."""

    def ended(self, report: Report, begun: bool) -> None:
        """It is over. `begun`: the caller has a part of the answer already."""
