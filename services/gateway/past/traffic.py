"""Copies of finished requests for those who record the traffic: what a simulator needs, and nothing of what was said.

Blocks, tenants, sessions and documents are named by keyed hashes (BLAKE2b, RFC 7693). The key is made for a recording
and forgotten with it, so that nobody can try texts, or compare two recordings.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

from infermesh.errors import MeshError, Reason
from infermesh.v1 import mesh_pb2 as ms
from services.gateway.report import Report

TAPS = 4  # recordings at a time
REQUESTS = 8192  # that may wait to be read, with as many blocks altogether as follow
BLOCKS = 1 << 20
BATCH = 64  # requests hashed in one go, some ms in a thread
BATCH_BLOCKS = 1 << 14
HASH_BITS = 53  # what a JSON number holds without loss wherever it is read
Finished = tuple[float, Report]  # unix time of the end


class Tap:
    """One recording's share of the traffic. `dropped`: requests that came faster than they were read."""

    def __init__(self, begun: float) -> None:
        self.dropped = 0
        self._begun = begun
        self._waiting: deque[Finished] = deque()
        self._blocks = 0
        self._some = asyncio.Event()

    def put(self, ended: float, report: Report) -> None:
        facts = report.facts
        if facts is None or not facts.slots or report.outcome == Reason.MODEL_NOT_FOUND.value:
            return
        if ended - report.duration_s < self._begun:
            return  # what it met on its way in is not in this recording
        if len(self._waiting) >= REQUESTS or self._blocks + len(facts.chain) > BLOCKS:
            self.dropped += 1
            return
        self._blocks += len(facts.chain)
        self._waiting.append((ended, report))
        self._some.set()

    async def take(self, timeout_s: float) -> list[Finished]:
        """What is there, at most a batch; empty when nothing came in time."""
        if not self._waiting:
            self._some.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._some.wait()
            except TimeoutError:
                return []
        found: list[Finished] = []
        blocks = 0
        while self._waiting and len(found) < BATCH and blocks < BATCH_BLOCKS:
            found.append(self._waiting.popleft())
            blocks += len(found[-1][1].facts.chain)  # type: ignore[union-attr]
        self._blocks -= blocks
        return found


class Traffic:
    """Who records now. Costs a request nothing while nobody does."""

    def __init__(self) -> None:
        self._taps: list[Tap] = []

    def keep(self, report: Report) -> None:
        """Takes note of the end of a request."""
        if self._taps:
            ended = time.time()
            for tap in self._taps:
                tap.put(ended, report)

    @contextmanager
    def tap(self) -> Iterator[Tap]:
        """Raises MeshError: FAILED_PRECONDITION, too many record already."""
        if len(self._taps) >= TAPS:
            raise MeshError(Reason.FAILED_PRECONDITION, f"{TAPS} recordings of this gateway run already; end one first")
        tap = Tap(time.time())
        self._taps.append(tap)
        try:
            yield tap
        finally:
            self._taps.remove(tap)


def traced(ended: float, report: Report, salt: bytes) -> ms.TracedRequest:
    """A finished request as it is recorded. Pure."""
    facts, record = report.facts, report.record
    assert facts is not None and record is not None
    prompt = report.prompt_tokens or record.prompt_tokens or 1
    found = ms.TracedRequest(
        timestamp_ms=round(1000 * (ended - report.duration_s), 3),
        kind=facts.kind,
        model=facts.model,
        tenant=_name(report.tenant, salt),
        tenant_class=facts.klass,
        priority=facts.priority,
        input_length=prompt,
        output_length=report.completion_tokens or (record.output_tokens if not report.ttft_s else 0),
        hash_ids=[_hash(link.to_bytes(8, "big"), salt) for link in facts.chain],
        block_tokens=facts.chain_share * prompt,
        max_tokens=facts.max_tokens,
        session_id=_name(facts.session_id, salt),
        document_id=_name(facts.document_id, salt),
        degrade=facts.degrade,
        outcome=report.outcome,
        instance=report.instance,
        served_model=report.served_model,
        attempts=report.attempts,
        cached_tokens=report.cached_tokens,
        ttft_ms=1000 * report.ttft_s,
        e2e_ms=1000 * report.duration_s,
    )
    return found


def _hash(value: bytes, salt: bytes) -> int:
    return int.from_bytes(blake2b(value, digest_size=8, key=salt).digest(), "big") >> (64 - HASH_BITS)


def _name(text: str, salt: bytes) -> str:
    """A name that says only whether two are the same."""
    return f"{_hash(text.encode(), salt):014x}" if text else ""
