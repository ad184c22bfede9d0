"""Decision records as they are shown, and those of past requests, kept on disk.

A request costs the event loop one append to a list; encoding and writing happen in a thread, some requests at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson
import structlog

from services.gateway.past.ring import Ring
from services.gateway.report import Report
from services.gateway.routing.decision import TERMS, Candidate, Record

FLUSH_S = 0.25
BATCH = 32  # reports that a thread encodes in one go: some ms
PENDING = 4096  # reports; more wait only when the disk stands still
WARN_S = 60.0  # between two warnings
SHOWN = 64  # candidates kept of a past decision: the cheapest, and the chosen one
REQUEST = (
    *("request_id", "method", "tenant", "model", "outcome", "instance", "served_model", "attempts"),
    *("ttft_s", "duration_s", "prompt_tokens", "completion_tokens", "cached_tokens", "preempted"),
)
T = TypeVar("T")
log = structlog.get_logger("past")


def shown(record: Record | Mapping[str, Any]) -> dict[str, Any]:
    """A decision record as `explain --json` prints it, from the value or from what was kept of it."""
    fields = dataclasses.asdict(record) if isinstance(record, Record) else dict(record)
    fields["candidates"] = [
        {
            "id": id,
            "cost_s": cost_s,
            "terms": dict(zip(TERMS, seconds, strict=False)),
            "weight": weight,
            "cached_tokens": cached,
            "ready": ready,
        }
        for id, cost_s, seconds, weight, cached, ready in fields["candidates"]
    ]
    fields["rejected"] = [{"id": id, "reason": word} for id, word in fields["rejected"]]
    return fields


def kept(at: float, report: Report) -> bytes:
    """A report as one line of JSON. `at`: unix time of the request's end."""
    tried = [(item.record, item.outcome) for item in report.tried]
    if not tried and report.record is not None:
        tried = [(report.record, report.outcome)]
    fields: dict[str, Any] = {name: getattr(report, name) for name in REQUEST}
    fields["at"] = at
    fields["decisions"] = [{"outcome": outcome, "record": _fewer(record)} for record, outcome in tried]
    return orjson.dumps(fields, default=tuple)


def _fewer(record: Record) -> Record:
    if len(record.candidates) <= SHOWN:
        return record

    def order(candidate: Candidate) -> tuple[bool, float]:
        return candidate.id != record.chosen, candidate.cost_s

    best = sorted(sorted(record.candidates, key=order)[:SHOWN])
    left_out = len(record.candidates) - SHOWN
    return dataclasses.replace(record, candidates=tuple(best), unexamined=record.unexamined + left_out)


def past(line: bytes) -> dict[str, Any]:
    """What `explain --request-id --json` prints: the last decision record, and beside it the request and every decision
    for it, in order. Raises ValueError for what is no such line."""
    try:
        fields = orjson.loads(line)
        decisions = [{"outcome": item["outcome"], **shown(item["record"])} for item in fields["decisions"]]
        fields.setdefault("preempted", 0)  # a line of an earlier version
        request = {name: fields[name] for name in ("at", *REQUEST)}
    except (KeyError, TypeError) as error:
        raise ValueError(f"a damaged line: {error!r}") from None
    last = dict(decisions[-1]) if decisions else shown(Record("", fields["model"], reason=fields["outcome"]))
    last.pop("outcome", None)
    return {**last, "request": request, "decisions": decisions}


class Decisions:
    """The decisions of past requests. One task runs `run`; `find` may be asked at any time."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._pending: list[tuple[float, Report]] = []
        self._dropped = 0
        self._warned = float("-inf")
        # One thread for all that touches the ring: what it began goes on when whoever waits for it is cancelled, and
        # two at once would write into each other's files.
        self._thread = ThreadPoolExecutor(1, "past-decisions")

    def keep(self, report: Report) -> None:
        """Takes note of the end of a request."""
        if len(self._pending) < PENDING:
            self._pending.append((time.time(), report))
        else:
            self._dropped += 1

    async def run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        while self._pending:
            batch, self._pending = self._pending[:BATCH], self._pending[BATCH:]
            try:
                await asyncio.shield(self._run(self._write, batch))
            except Exception as error:  # a full disk, or a fault of ours: serving goes on without
                self._dropped += len(batch)
                self._warn(f"{type(error).__name__}: {error}")
                return
        if self._dropped:
            self._warn("the disk is too slow")

    def _warn(self, why: str) -> None:
        now = time.monotonic()
        if now - self._warned >= WARN_S:
            log.warning("decisions of past requests are lost", why=why, lost=self._dropped)
            self._dropped, self._warned = 0, now

    async def find(self, request_id: str, may: Callable[[str], bool]) -> dict[str, Any] | None:
        """The newest request of that id, of a tenant that `may` be shown."""
        await self.flush()
        beginning = orjson.dumps({"request_id": request_id})[:-1] + b","
        return await self._run(self._search, beginning, may)

    async def since(self) -> float | None:
        """Unix time of the oldest that is kept; None while there is nothing."""
        return await self._run(self._ring.since)

    async def close(self) -> None:
        await self.flush()
        await self._run(self._ring.close)
        self._thread.shutdown()

    async def _run(self, work: Callable[..., T], *given: object) -> T:
        """In the thread, after what was asked of it before."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)

    def _write(self, batch: list[tuple[float, Report]]) -> None:
        self._ring.append([kept(at, report) for at, report in batch])

    def _search(self, beginning: bytes, may: Callable[[str], bool]) -> dict[str, Any] | None:
        def wanted(line: bytes) -> bool:
            try:
                return may(past(line)["request"]["tenant"])
            except ValueError:
                return False

        line = self._ring.find(beginning, wanted)
        return past(line) if line is not None else None
