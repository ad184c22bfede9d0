"""OpenTelemetry spans of a request: `route`, and below it one span an attempt. Nothing is imported while off.

A request that the forwarder serves directly has `route` as its server span. One that a front serves with several
requests of its own, or turns away, has a server span named after its entrance; the routes are below it.
"""

from __future__ import annotations

from heapq import nsmallest
from typing import TYPE_CHECKING, Any

import orjson

from services.chassis import telemetry_names as names
from services.chassis.telemetry import Telemetry, process_resource
from services.gateway.entrance import Arrival, Entrance
from services.gateway.report import OK, Report
from services.gateway.routing.decision import TERMS, Candidate, Lease, Record

if TYPE_CHECKING:
    from services.chassis.telemetry_spans import Place, Span, Tracer
    from services.gateway.report import Report

SHOWN = 8  # candidates of one decision: the cheapest, and the chosen one
REJECTED = 32
_OPERATIONS = {"chat": "Chat", "complete": "Complete", "embed": "Embed", "rerank": "Rerank"}


class Tracing:
    """Makes the spans of this gateway's requests. `ratio`: of the traces that begin here, as kept."""

    def __init__(self, endpoint: str, gateway_id: str, ratio: float = 1.0) -> None:
        self._telemetry = Telemetry(endpoint, process_resource("gateway", gateway_id), ratio, "infermesh.gateway")
        self._tracer = self._telemetry.tracer

    @property
    def export(self) -> Any:
        """What sends them: its counts, and whom it tells of losses."""
        return self._telemetry.export

    def request(self, method: str, arrival: Arrival) -> Unkept:
        place = self._tracer.place(arrival.trace)
        return Spans(self._tracer, place, method, arrival) if place.kept else Unkept(place)

    def root(self, arrival: Arrival) -> Root | None:
        return Root(self._tracer, arrival, arrival.entrance) if arrival.entrance is not None else None

    async def close(self) -> None:
        await self._telemetry.close()


class Root:
    """The server span of a request that a front does not simply hand on."""

    def __init__(self, tracer: Tracer, arrival: Arrival, entrance: Entrance) -> None:
        from opentelemetry.trace import SpanKind

        self._entrance = entrance
        self._span: Span | None = None
        self._place = place = tracer.place(arrival.trace)
        if place.kept:
            attributes = {**entrance.attributes, names.REQUEST_ID: arrival.request_id}
            self._span = tracer.begin(entrance.title, SpanKind.SERVER, place, attributes)

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
    """The place of the spans of a request whose trace is not kept."""

    __slots__ = ("_headers", "trace_id")

    def __init__(self, place: Place) -> None:
        self._headers = place.headers
        self.trace_id = f"{place.trace_id:032x}"

    def decided(self, record: Record) -> None:
        pass

    def attempt(self, lease: Lease, number: int, model: str, greeted: bool) -> dict[str, str]:
        return self._headers

    def attempt_ended(self, outcome: str, verified: bool | None, ttft_s: float, tokens: int) -> None:
        pass

    def resumed(self, successor: str, reason: str, tokens: int, pause_s: float, exact: bool) -> None:
        pass

    def ended(self, report: Report, begun: bool) -> None:
        pass


class Spans(Unkept):
    """The spans of one request."""

    __slots__ = ("_attempt", "_client", "_decided", "_entrance", "_route")

    def __init__(self, tracer: Tracer, place: Place, method: str, arrival: Arrival) -> None:
        from opentelemetry.trace import SpanKind

        method = method.lower()
        attributes = {
            names.OPERATION: names.OPERATIONS.get(_OPERATIONS.get(method, method.capitalize()), method),
            names.REQUEST_ID: arrival.request_id,
        }
        entrance = arrival.entrance
        if entrance is not None:
            attributes |= entrance.attributes
        kind = SpanKind.INTERNAL if entrance is None else SpanKind.SERVER
        self._entrance = entrance
        self._route = tracer.begin(names.ROUTE, kind, place, attributes)
        self._client = SpanKind.CLIENT
        self._attempt: Span | None = None
        self._decided = False
        self.trace_id = self._route.trace_id

    def decided(self, record: Record) -> None:
        """The first decision is the route's own; those after a failed attempt, and refusals then, are its events."""
        if record.degraded_from:
            to = {names.REQUEST_MODEL: record.degraded_from, names.MODEL_ID: record.model, names.REASON: record.reason}
            self._route.event(names.DEGRADE, to)
        if self._decided:
            self._route.event(names.DECISION, _decision(record))
            return
        self._decided = True
        attributes = self._route.attributes
        attributes[names.REQUEST_MODEL] = (record.degraded_from or record.model)[:256]
        attributes |= _decision(record)

    def attempt(self, lease: Lease, number: int, model: str, greeted: bool) -> dict[str, str]:
        """Begins an attempt's span; returns the trace headers for its call. `greeted`: the Link to the instance is up,
        whose hello said the same id and life."""
        who: dict[str, Any] = {names.INSTANCE_ID: lease.instance_id, names.MODEL_ID: model}
        if greeted:
            who[names.VERIFIED], who[names.VERIFIED_BY] = True, "link"
        route = self._route
        route.attributes |= who
        route.attributes[names.ATTEMPTS] = number
        who[names.ATTEMPT_NUMBER] = number
        who[names.INCARNATION] = f"{lease.incarnation:016x}"
        self._attempt = route.child(names.ATTEMPT, self._client, who)
        return self._attempt.headers

    def attempt_ended(self, outcome: str, verified: bool | None, ttft_s: float, tokens: int) -> None:
        """`verified`: whether the answer came from whom it was asked of; None: no answer came."""
        span, self._attempt = self._attempt, None
        if span is None:
            return
        attributes = span.attributes
        if verified is not None:
            told = self._route.attributes
            attributes[names.VERIFIED] = told[names.VERIFIED] = verified
            attributes[names.VERIFIED_BY] = told[names.VERIFIED_BY] = "answer"
        attributes[names.OUTPUT_TOKENS] = tokens
        if ttft_s:
            attributes[names.FIRST_CHUNK_S] = ttft_s
        span.end("" if outcome == OK else outcome)

    def resumed(self, successor: str, reason: str, tokens: int, pause_s: float, exact: bool) -> None:
        """The stream goes on at `successor` after so many tokens."""
        attributes: dict[str, Any] = {
            names.INSTANCE_ID: successor,
            names.RESUME_REASON: reason,
            names.RESUME_TOKENS: tokens,
            names.RESUME_PAUSE: pause_s,
            names.RESUME_EXACT: exact,
        }
        self._route.event(names.RESUME, attributes)
        self._route.attributes[names.RESUME_EXACT] = exact

    def ended(self, report: Report, begun: bool) -> None:
        """`begun`: the caller has a part of the answer already."""
        attributes, outcome = self._route.attributes, report.outcome
        attributes[names.INPUT_TOKENS] = report.prompt_tokens
        attributes[names.OUTPUT_TOKENS] = report.completion_tokens
        attributes[names.CACHED_TOKENS] = report.cached_tokens
        if report.served_model:
            attributes[names.RESPONSE_MODEL] = report.served_model
        if self._entrance is not None:
            attributes |= self._entrance.status(outcome, begun)
        self._route.end("" if outcome == OK else outcome)


def _decision(record: Record) -> dict[str, Any]:
    """A decision as attributes."""
    candidates = record.candidates
    if len(candidates) > SHOWN:
        candidates = tuple(nsmallest(SHOWN, candidates, key=lambda one: (one.id != record.chosen, one.cost_s)))
    shown = {
        "candidates": [_candidate(one) for one in candidates],
        "rejected": dict(record.rejected[:REJECTED]),
    }
    found: dict[str, Any] = {
        names.REASON: record.reason,
        names.CHOSEN: record.chosen,
        names.ESTIMATE: record.estimate_s,
        names.WAITED: record.waited_s,
        names.PREDICTED_TTFT: record.predicted_ttft_s,
        names.PREDICTED_CACHED: record.cached_tokens,
        names.PROMPT_TOKENS: record.prompt_tokens,
        names.UNEXAMINED: record.unexamined + len(record.candidates) - len(candidates),
        names.RECORD: orjson.dumps(shown).decode(),
    }
    if record.degraded_from:
        found[names.DEGRADED_FROM] = record.degraded_from
    return found


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "id": one.id,
        "cost_s": one.cost_s,
        "terms_s": dict(zip(TERMS, one.seconds, strict=False)),
        "weight": one.weight,
        "cached_tokens": one.cached_tokens,
    }
