"""One embedding or rerank instance: first come first served, `fixed_ms` and tokens / `tokens_per_s` a request."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from services.gateway.routing.facts import LoadReport
from services.gateway.simulator.job import Job


@dataclass(slots=True)
class Turn:
    """A request in work."""

    start: float
    end: float
    job: Job


class EncoderEngine:
    def __init__(self, id: str, fixed_s: float, tokens_per_s: float) -> None:
        self.id = id
        self.busy_s = 0.0
        self.steps = 0
        self.changes = 0
        self.segment: Turn | None = None
        self._fixed_s = fixed_s
        self._tokens_per_s = tokens_per_s
        self._waiting: deque[Job] = deque()
        self._queued = 0
        self._shares: dict[int, list[int]] = {}

    def refuses(self, job: Job) -> bool:
        return False

    def add(self, job: Job, now: float) -> bool:
        self.changes += 1
        job.output, job.cached, job.left = 0, 0, job.request.prompt
        self._queued += job.left
        share = self._shares.setdefault(job.gateway, [0, 0, 0])
        share[0] += 1
        share[1] += job.left
        if job.lease is not None and job.lease.seq > share[2]:
            share[2] = job.lease.seq
        self._waiting.append(job)
        if self.segment is not None:
            return False
        self._next(now)
        return True

    def advance(self) -> tuple[list[Job], list[Job]]:
        turn = self.segment
        assert turn is not None
        self.changes += 1
        self.steps += 1
        self.busy_s += turn.end - turn.start
        self._queued -= turn.job.left
        share = self._shares[turn.job.gateway]
        share[0] -= 1
        share[1] -= turn.job.left
        turn.job.left = 0
        self._next(turn.end)
        return [turn.job], [turn.job]

    def load(self, gateway: int, now: float) -> LoadReport:
        share = self._shares.get(gateway, (0, 0, 0))
        return LoadReport(
            running=int(self.segment is not None),
            waiting=len(self._waiting),
            queued_tokens=self._queued,
            steps=self.steps,
            seen_seq=share[2],
            own_running=share[0],
            own_queued_tokens=share[1],
        )

    def _next(self, now: float) -> None:
        if not self._waiting:
            self.segment = None
            return
        job = self._waiting.popleft()
        self.segment = Turn(now, now + self.service_s(job.left), job)

    def service_s(self, tokens: int) -> float:
        """Seconds of one request by itself."""
        return self._fixed_s + tokens / self._tokens_per_s
