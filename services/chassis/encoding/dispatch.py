"""From requests to batches to replicas and back: the thin shell around the micro-batcher."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog

from infermesh.errors import MeshError, Reason
from services.chassis.encoding.microbatch import Batch, Limits, MicroBatcher
from services.chassis.encoding.replicas import Replica, ReplicaLost, ReplicaPool, ReplicaRefused
from services.chassis.encoding.rows import Floats, Row

TRIES = 2
PACE_WEIGHT = 0.1  # of the newest batch in the running mean
log = structlog.get_logger("dispatch")


@dataclass(slots=True)
class Owner:
    """One request: its rows, and what has come back."""

    rows: Sequence[Row]
    result: asyncio.Future[Floats]
    started: Callable[[], None]
    out: Floats | None = None
    missing: int = field(default=0)
    running: bool = False


class Dispatcher:
    """`batches`, `rows` and `tokens` count what was computed since start."""

    def __init__(self, limits: Limits, timeout_s: float) -> None:
        self.batcher = MicroBatcher(limits)
        self.batches = 0
        self.rows = 0
        self.tokens_per_s = 0.0  # of one replica, running mean
        self._timeout_s = timeout_s
        self._pool: ReplicaPool
        self._owners: dict[int, Owner] = {}
        self._ids = itertools.count(1)
        self._again: deque[Batch] = deque()
        self._carriers: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    def attach(self, pool: ReplicaPool) -> None:
        self._pool = pool

    @property
    def waiting(self) -> int:
        """Requests of which nothing has been sent to a replica yet."""
        return sum(not owner.running for owner in self._owners.values())

    @property
    def running(self) -> int:
        return len(self._owners) - self.waiting

    async def run(
        self,
        rows: Sequence[Row],
        *,
        bulk: bool = False,
        priority: int = 0,
        started: Callable[[], None] = lambda: None,
    ) -> Floats:
        """Computes the rows, float32 [rows, columns]. `started` is called when the first of them goes to a replica.

        A cancelled call takes its queued rows with it.

        Raises:
            MeshError: INSTANCE_FULL, or ENGINE_FAILED when two replicas died of a batch.
        """
        loop = asyncio.get_running_loop()
        key = next(self._ids)
        pace = self.tokens_per_s * max(1, len(self._pool.live))
        lengths, groups = [len(row) for row in rows], [row.skip for row in rows]
        self.batcher.offer(key, lengths, loop.time(), bulk=bulk, priority=priority, groups=groups, tokens_per_s=pace)
        owner = Owner(rows, loop.create_future(), started, missing=len(rows))
        self._owners[key] = owner
        # In the next round of the loop, so that requests that arrived together are seen together.
        loop.call_soon(self.wake)
        try:
            return await owner.result
        finally:
            del self._owners[key]
            if owner.missing:  # else none of its rows is queued, and a long queue need not be searched
                self.batcher.drop(key)
            self._tell()

    async def change(self) -> None:
        """Returns when the queue has become shorter."""
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Sends what is due to replicas that are free. Called whenever either may have changed."""
        now = asyncio.get_running_loop().time()
        while self._again and (replica := self._pool.pick()):
            self._send(self._again.popleft(), replica, TRIES)
        while (replica := self._pool.pick()) and (batch := self.batcher.take(now, self._pool.free, self._pool.busy)):
            self._send(batch, replica, 1)
        if self._timer:
            self._timer.cancel()
            self._timer = None
        due = self.batcher.due(now, self._pool.free, self._pool.busy)
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - now), self.wake)

    def _send(self, batch: Batch, replica: Replica, attempt: int) -> None:
        rows = []
        for item in batch.items:
            if (owner := self._owners.get(item.owner)) is None:
                continue
            rows.append(owner.rows[item.place])
            if not owner.running:
                owner.running = True
                owner.started()
        if not rows:
            return
        live = Batch(tuple(item for item in batch.items if item.owner in self._owners))
        task = asyncio.ensure_future(self._carry(live, replica, replica.compute(rows), attempt))
        self._carriers.add(task)
        task.add_done_callback(self._carriers.discard)

    async def _carry(self, batch: Batch, replica: Replica, answer: asyncio.Future[Floats], attempt: int) -> None:
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await answer
        except (ReplicaLost, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                log.error("no answer; the replica is killed", name=replica.name, after_s=self._timeout_s)
                replica.kill()
            if attempt < TRIES:
                self._again.append(batch)
            else:
                self._fail(batch, f"{TRIES} replicas were lost computing it: {error}")
        except ReplicaRefused as error:
            log.error("a batch failed", error=str(error))
            self._fail(batch, "the model failed on it; the server's log tells more")
        else:
            self._hand_out(batch, result)
            self._learn(batch, asyncio.get_running_loop().time() - began)
        self.wake()

    def _hand_out(self, batch: Batch, result: Floats) -> None:
        for item, values in zip(batch.items, result, strict=True):
            owner = self._owners.get(item.owner)
            if owner is None or owner.result.done():
                continue
            if owner.out is None:
                owner.out = np.empty((len(owner.rows), result.shape[1]), np.float32)
            owner.out[item.place] = values
            owner.missing -= 1
            if not owner.missing:
                owner.result.set_result(owner.out)

    def _fail(self, batch: Batch, why: str) -> None:
        for key in {item.owner for item in batch.items}:
            owner = self._owners.get(key)
            if owner is not None and not owner.result.done():
                owner.result.set_exception(MeshError(Reason.ENGINE_FAILED, why))

    def _learn(self, batch: Batch, took_s: float) -> None:
        self.batches += 1
        self.rows += len(batch.items)
        pace = batch.tokens / max(took_s, 1e-6)
        self.tokens_per_s += (pace - self.tokens_per_s) * (PACE_WEIGHT if self.tokens_per_s else 1.0)
