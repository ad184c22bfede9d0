"""What is noted of a request while it runs, and the spans that it becomes afterwards, some requests in one go.

Work done in bulk takes half the time: its code and its words are in the processor's caches from the second one on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from heapq import nsmallest
from typing import Any

import orjson
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanKind

from services.chassis import telemetry_names as names
from services.chassis.telemetry_spans import Place, Tracer
from services.gateway.entrance import Arrival
from services.gateway.report import OK, Report
from services.gateway.routing.decision import TERMS, Candidate, Lease, Record
from services.gateway.tracing import Unkept

SHOWN = 8  # candidates of one decision: the cheapest, and the chosen one
REJECTED = 32
_OPERATIONS = {"CHAT": "Chat", "COMPLETE": "Complete", "EMBED": "Embed", "RERANK": "Rerank"}


class _Attempt:
    """One call of one instance. Unix times in ns."""

    __slots__ = (
        "begun_ns", "ended_ns", "greeted", "id", "lease", "model", "number", "outcome", "tokens", "ttft_s", "verified",
    )  # fmt: skip

    def __init__(self, id: str, lease: Lease, number: int, model: str, greeted: bool) -> None:
        self.id = id
        self.lease = lease
        self.number = number
        self.model = model
        self.greeted = greeted
        self.begun_ns = time.time_ns()
        self.ended_ns = 0
        self.outcome = ""
        self.verified: bool | None = None
        self.ttft_s = 0.0
        self.tokens = 0


class Noted(Unkept):
    """A request whose trace is kept. Its spans are complete once it is over, and handed to `over` then."""

    __slots__ = (
        "_arrival", "_attempts", "_begun", "_begun_ns", "_decisions", "_ended_ns", "_exact", "_id", "_method", "_over",
        "_report", "_resumes", "_tracer",
    )  # fmt: skip

    def __init__(
        self, tracer: Tracer, over: Callable[[Noted], None], place: Place, method: str, arrival: Arrival
    ) -> None:
        super().__init__(place)
        self._tracer = tracer
        self._over = over
        self._method = method
        self._arrival = arrival
        self._id = tracer.new_id()
        self._begun_ns = time.time_ns()
        self._decisions: list[tuple[int, Record]] = []
        self._attempts: list[_Attempt] = []
        self._resumes: list[Event] = []
        self._exact: bool | None = None
        self._report: Report

    @property
    def spans(self) -> int:
        return 1 + len(self._attempts)

    def decided(self, record: Record) -> None:
        self._decisions.append((time.time_ns(), record))

    def attempt(self, lease: Lease, number: int, model: str, greeted: bool) -> dict[str, str]:
        made = _Attempt(self._tracer.new_id(), lease, number, model, greeted)
        self._attempts.append(made)
        return self.place.below(made.id)

    def attempt_ended(self, outcome: str, verified: bool | None, ttft_s: float, tokens: int) -> None:
        last = self._attempts[-1]
        last.outcome, last.verified, last.ttft_s, last.tokens = outcome, verified, ttft_s, tokens
        last.ended_ns = time.time_ns()

    def resumed(self, successor: str, reason: str, tokens: int, pause_s: float, exact: bool) -> None:
        attributes: dict[str, Any] = {
            names.INSTANCE_ID: successor,
            names.RESUME_REASON: reason,
            names.RESUME_TOKENS: tokens,
            names.RESUME_PAUSE: pause_s,
            names.RESUME_EXACT: exact,
        }
        self._resumes.append(Event(names.RESUME, attributes, time.time_ns()))
        self._exact = exact

    def ended(self, report: Report, begun: bool) -> None:
        self._report, self._begun, self._ended_ns = report, begun, time.time_ns()
        self._over(self)

    def made(self) -> Iterator[ReadableSpan]:
        """The spans: those of the attempts, then the route."""
        for attempt in self._attempts:
            times = (attempt.begun_ns, attempt.ended_ns or self._ended_ns)
            error = "" if attempt.outcome == OK else attempt.outcome
            told = {
                **_who(attempt),
                names.ATTEMPT_NUMBER: attempt.number,
                names.INCARNATION: f"{attempt.lease.incarnation:016x}",
                names.OUTPUT_TOKENS: attempt.tokens,
            }
            if attempt.ttft_s:
                told[names.FIRST_CHUNK_S] = attempt.ttft_s
            yield self._tracer.made(
                names.ATTEMPT, SpanKind.CLIENT, self.place, attempt.id, times, told, error=error, above=self._id
            )
        report = self._report
        entrance = self._arrival.entrance
        yield self._tracer.made(
            names.ROUTE,
            SpanKind.INTERNAL if entrance is None else SpanKind.SERVER,
            self.place,
            self._id,
            (self._begun_ns, self._ended_ns),
            self._route(),
            error="" if report.outcome == OK else report.outcome,
            events=self._events(),
        )

    def _route(self) -> dict[str, Any]:
        report, entrance = self._report, self._arrival.entrance
        told: dict[str, Any] = {
            names.OPERATION: names.OPERATIONS.get(_OPERATIONS.get(self._method, ""), self._method.lower()),
            names.REQUEST_ID: self._arrival.request_id,
            names.INPUT_TOKENS: report.prompt_tokens,
            names.OUTPUT_TOKENS: report.completion_tokens,
            names.CACHED_TOKENS: report.cached_tokens,
        }
        if report.preempted:
            told[names.PREEMPTED] = report.preempted
        if entrance is not None:
            told |= entrance.attributes
            told |= entrance.status(report.outcome, self._begun)
        if report.served_model:
            told[names.RESPONSE_MODEL] = report.served_model
        if self._decisions:
            record = self._decisions[0][1]
            told[names.REQUEST_MODEL] = (record.degraded_from or record.model)[:256]
            told |= _decision(record)
        if self._attempts:
            told[names.ATTEMPTS] = self._attempts[-1].number
            told |= _who(self._attempts[-1])
        if self._exact is not None:
            told[names.RESUME_EXACT] = self._exact
        return told

    def _events(self) -> list[Event]:
        """The first decision is the route's own; those after a failed attempt, and refusals then, are its events."""
        if len(self._decisions) < 2 and not self._resumes and not any(one.degraded_from for _, one in self._decisions):
            return []
        found = list(self._resumes)
        for number, (at, record) in enumerate(self._decisions):
            if record.degraded_from:
                asked = {names.REQUEST_MODEL: record.degraded_from, names.MODEL_ID: record.model}
                found.append(Event(names.DEGRADE, asked | {names.REASON: record.reason}, at))
            if number:
                found.append(Event(names.DECISION, _decision(record), at))
        return sorted(found, key=lambda event: event.timestamp)


def _who(attempt: _Attempt) -> dict[str, Any]:
    """Who was asked, and whether it is who it should be: by its answer or, before that, by its Link's hello."""
    who: dict[str, Any] = {names.INSTANCE_ID: attempt.lease.instance_id, names.MODEL_ID: attempt.model}
    if attempt.verified is not None:
        who[names.VERIFIED], who[names.VERIFIED_BY] = attempt.verified, "answer"
    elif attempt.greeted:
        who[names.VERIFIED], who[names.VERIFIED_BY] = True, "link"
    return who


def _decision(record: Record) -> dict[str, Any]:
    """A decision as attributes."""
    candidates = record.candidates
    if len(candidates) > SHOWN:
        candidates = tuple(nsmallest(SHOWN, candidates, key=lambda one: (one.id != record.chosen, one.cost_s)))
    shown = {
        "estimate_s": record.estimate_s,
        "prompt_tokens": record.prompt_tokens,
        "unexamined": record.unexamined + len(record.candidates) - len(candidates),
        "candidates": [_candidate(one) for one in candidates],
        "rejected": dict(record.rejected[:REJECTED]),
    }
    found: dict[str, Any] = {
        names.REASON: record.reason,
        names.CHOSEN: record.chosen,
        names.WAITED: record.waited_s,
        names.PREDICTED_TTFT: record.predicted_ttft_s,
        names.PREDICTED_CACHED: record.cached_tokens,
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
