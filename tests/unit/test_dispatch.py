"""The dispatcher over replicas that are none: what they are sent, and what becomes of it when they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from infermesh.errors import MeshError, Reason
from services.chassis.encoding.dispatch import Dispatcher
from services.chassis.encoding.microbatch import Limits
from services.chassis.encoding.replicas import ReplicaLost, ReplicaRefused
from services.chassis.encoding.rows import HEAD_BYTES as HEAD
from services.chassis.encoding.rows import Row, pack_batch, unpack_batch, unpack_head
from tests.kit.mesh import until


class Fake:
    """One replica and its pool. A row's result is its first id and the `skip` that its batch was sent with."""

    def __init__(self, dispatcher: Dispatcher, fails: Sequence[Exception | None] = ()) -> None:
        self.name = "fake"
        self.batches: list[list[Row]] = []
        self.killed = 0
        self.held: asyncio.Event | None = None
        self.in_flight = 0
        self._fails = list(fails)
        dispatcher.attach(self)  # type: ignore[arg-type]

    @property
    def live(self) -> list[Any]:
        return [self]

    @property
    def free(self) -> int:
        return 1 - self.in_flight

    @property
    def busy(self) -> int:
        return self.in_flight

    def pick(self) -> Any:
        return self if self.free else None

    def kill(self) -> None:
        self.killed += 1

    def compute(self, rows: Sequence[Row]) -> asyncio.Future[Any]:
        frame = pack_batch(1, rows)
        self.batches.append(unpack_batch(unpack_head(frame[:HEAD]), frame[HEAD:]))
        self.in_flight += 1
        answer = asyncio.ensure_future(self._answer(self.batches[-1]))
        answer.add_done_callback(lambda _: setattr(self, "in_flight", self.in_flight - 1))
        return answer

    async def _answer(self, rows: list[Row]) -> Any:
        await asyncio.sleep(0.001)  # as a socket does, it answers later than it is asked
        fault = self._fails.pop(0) if self._fails else None
        if isinstance(fault, TimeoutError):
            await asyncio.sleep(100)
        if fault is not None:
            raise fault
        if self.held is not None:
            await self.held.wait()
        return np.array([[row.ids[0], row.skip] for row in rows], np.float32)


def row(first: int, length: int = 4, skip: int = 0) -> Row:
    return Row(np.full(length, first, np.int32), skip=skip)


async def test_rows_with_different_prompts_are_never_pooled_alike() -> None:
    """A query and its documents may have prompts of different lengths; a batch has one."""
    dispatcher = Dispatcher(Limits(), timeout_s=5)
    Fake(dispatcher)
    found = await dispatcher.run([row(1, skip=3), row(2, skip=5), row(3, skip=5), row(4, skip=0)])
    assert found.tolist() == [[1, 3], [2, 5], [3, 5], [4, 0]]


async def test_a_lost_batch_is_tried_once_more_and_a_hung_replica_killed() -> None:
    dispatcher = Dispatcher(Limits(), timeout_s=1)
    fake = Fake(dispatcher, [ReplicaLost("gone"), None, TimeoutError(), None])
    assert (await dispatcher.run([row(7)])).tolist() == [[7, 0]] and len(fake.batches) == 2 and not fake.killed
    assert (await dispatcher.run([row(8)])).tolist() == [[8, 0]] and len(fake.batches) == 4 and fake.killed == 1
    assert (dispatcher.running, dispatcher.waiting, dispatcher.batches, dispatcher.rows) == (0, 0, 2, 2)


@pytest.mark.parametrize(("fails", "sent"), [([ReplicaLost("gone")] * 2, 2), ([ReplicaRefused("a secret prompt")], 1)])
async def test_a_batch_that_cannot_be_computed_fails_its_requests_alone(fails: list[Exception], sent: int) -> None:
    dispatcher = Dispatcher(Limits(), timeout_s=5)
    fake = Fake(dispatcher, fails)
    with pytest.raises(MeshError) as failed:
        await dispatcher.run([row(1)])
    assert failed.value.reason is Reason.ENGINE_FAILED and "secret" not in failed.value.message
    assert len(fake.batches) == sent
    assert (await dispatcher.run([row(2)])).tolist() == [[2, 0]]


async def test_who_leaves_takes_queued_rows_along_and_the_others_get_theirs() -> None:
    dispatcher = Dispatcher(Limits(batch_rows=2, wait_s=0), timeout_s=5)
    fake = Fake(dispatcher)
    fake.held = asyncio.Event()
    first = asyncio.create_task(dispatcher.run([row(at) for at in range(1, 7)]))
    second = asyncio.create_task(dispatcher.run([row(9)]))
    await until(lambda: (len(fake.batches), dispatcher.running, dispatcher.waiting) == (1, 1, 1), 20)
    changed = asyncio.create_task(dispatcher.change())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first, changed}, timeout=20)
    assert first.cancelled() and changed.done() and len(dispatcher.batcher) == 1
    fake.held.set()
    assert (await second).tolist() == [[9, 0]]
    assert len(fake.batches) == 2 and (len(dispatcher.batcher), dispatcher.batcher.tokens) == (0, 0)
