"""The replicas of one instance: processes behind one address, restarted when they die.

`pick` gives the least loaded one with room. A replica that dies takes its batch with it (`ReplicaLost`: the dispatcher
tries once more elsewhere) and is launched again, with growing pauses. The pool is dead only when every place has failed
MAX_FAILURES times in a row.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import structlog

from services.chassis.encoding.encoder import LoadPlan, ModelFacts
from services.chassis.encoding.replica import START_AGAIN
from services.chassis.encoding.rows import (
    HEAD_BYTES,
    Floats,
    Head,
    Kind,
    Row,
    pack_batch,
    pack_text,
    unpack_head,
    unpack_result,
)

MAX_FAILURES = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
STOP_S = 5.0
BUFFER_BYTES = 4 << 20
# Progress bars and the hub's chatter have no place in a service's log.
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
log = structlog.get_logger("replica")


class ReplicaLost(Exception):
    """The process died with this batch in it."""


class ReplicaRefused(Exception):
    """The process lives, the batch failed in it."""


class Replica:
    """One running process, its model loaded or on its way."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, link: socket.socket) -> None:
        self.name = name
        self.process = process
        self.tokens = 0  # padded, sent and not answered
        self._link = link
        self._waiting: dict[int, asyncio.Future[Floats]] = {}
        self._serial = 0
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    async def load(self, plan: LoadPlan, progress: Callable[[str], None]) -> ModelFacts:
        """Waits until the model is in.

        Raises:
            ReplicaRefused: it cannot be loaded, with the reason.
            ReplicaLost: the process ended.
        """
        self._reader, self._writer = await asyncio.open_connection(sock=self._link, limit=BUFFER_BYTES)
        self._writer.write(pack_text(Kind.SETUP, plan.model_dump_json()))
        while True:
            head, body = await self._frame()
            if head.kind is Kind.READY:
                return ModelFacts.model_validate_json(body)
            if head.kind is Kind.FAILED:
                raise ReplicaRefused(body.decode())
            progress(f"{self.name}: {body.decode()}")

    def compute(self, rows: Sequence[Row]) -> asyncio.Future[Floats]:
        """Sends a batch; counted from now until its answer: float32 [rows, columns], ReplicaLost or ReplicaRefused."""
        self._serial += 1
        serial = self._serial
        answer = asyncio.get_running_loop().create_future()
        self._waiting[serial] = answer
        cost = max(len(row) for row in rows) * len(rows)
        self.tokens += cost

        def done(_: asyncio.Future[Floats]) -> None:
            self.tokens -= cost
            del self._waiting[serial]

        answer.add_done_callback(done)
        self._writer.write(pack_batch(serial, rows))
        return answer

    async def answer(self) -> None:
        """Hands results to those who wait for them, until the process ends."""
        try:
            while True:
                head, body = await self._frame()
                waiting = self._waiting.get(head.serial)
                if waiting is None or waiting.done():
                    continue
                if head.kind is Kind.RESULT:
                    waiting.set_result(unpack_result(head, body))
                else:
                    waiting.set_exception(ReplicaRefused(body.decode()))
        except ReplicaLost as error:
            for waiting in list(self._waiting.values()):
                if not waiting.done():
                    waiting.set_exception(ReplicaLost(str(error)))

    async def _frame(self) -> tuple[Head, bytes]:
        try:
            head = unpack_head(await self._reader.readexactly(HEAD_BYTES))
            return head, await self._reader.readexactly(head.size)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ReplicaLost(f"{self.name} died") from None

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)

    async def close(self) -> int:
        """Lets it go; kills it if it does not. Returns its exit code."""
        if hasattr(self, "_writer"):
            self._writer.close()
        else:
            self._link.close()
        try:
            return await asyncio.wait_for(self.process.wait(), STOP_S)
        except TimeoutError:
            self.kill()
            return await self.process.wait()


class ReplicaPool:
    """`changed` is called when a replica comes up."""

    def __init__(self, plans: Sequence[LoadPlan], changed: Callable[[], None]) -> None:
        self._plans = list(plans)
        self._changed = changed
        self._depth = 1  # batches that a replica holds at once
        self._live: dict[int, Replica] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._given_up: dict[int, str] = {}
        self._dead = asyncio.Event()
        self._closing = False

    @property
    def live(self) -> list[Replica]:
        return list(self._live.values())

    @property
    def free(self) -> int:
        return sum(self._depth - replica.in_flight for replica in self._live.values())

    @property
    def busy(self) -> int:
        """Batches being computed."""
        return sum(replica.in_flight for replica in self._live.values())

    def pick(self) -> Replica | None:
        """The replica with the least to do that has room."""
        open_ = [replica for replica in self._live.values() if replica.in_flight < self._depth]
        return min(open_, key=lambda replica: (replica.tokens, replica.name), default=None)

    async def start(self, progress: Callable[[str], None]) -> ModelFacts:
        """Launches all. What the first of them chose (backend, device) holds for those launched later.

        Raises:
            ReplicaRefused, ReplicaLost: none can be started.
        """
        places = range(len(self._plans))
        launched = await asyncio.gather(*(self._launch(place, progress) for place in places), return_exceptions=True)
        up = [result for result in launched if not isinstance(result, BaseException)]
        failures = [result for result in launched if isinstance(result, BaseException)]
        if not up:
            raise failures[0]
        facts = up[0][1]
        if facts.device.startswith("cuda"):
            self._depth = 2  # a GPU would stand idle between one answer and the next batch
        for place, result in enumerate(launched):
            plan = self._plans[place]
            device = facts.device if plan.device == "auto" else plan.device
            self._plans[place] = plan.model_copy(update={"backend": facts.backend, "device": device})
            if isinstance(result, BaseException):
                log.error("a replica cannot be started", place=place, error=str(result))
            first = None if isinstance(result, BaseException) else result[0]
            self._keepers.append(asyncio.create_task(self._keep(place, first)))
        await asyncio.sleep(0)  # each keeper has put its replica into service
        return facts

    async def died(self) -> str:
        """Returns, with the reasons, when no replica can be started any more."""
        await self._dead.wait()
        return "; ".join(sorted(set(self._given_up.values())))

    async def close(self) -> None:
        self._closing = True
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self.live))

    async def _launch(self, place: int, progress: Callable[[str], None]) -> tuple[Replica, ModelFacts]:
        plan = self._plans[place]
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "services.chassis.encoding.replica", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # and in its service's session, so that whoever sweeps that up finds it
                env=os.environ | QUIET | {"OMP_NUM_THREADS": str(plan.threads)},
            )
        ours.setblocking(False)
        replica = Replica(f"replica {place} on {plan.device}", process, ours)
        try:
            facts = await replica.load(plan, progress)
        except ReplicaLost:
            if await replica.close() == START_AGAIN:
                return await self._launch(place, progress)
            raise
        except BaseException:
            replica.kill()
            await replica.close()
            raise
        return replica, facts

    async def _keep(self, place: int, replica: Replica | None) -> None:
        """Holds one place filled."""
        failures = 0 if replica else 1
        reason = "it could not be started"
        while not self._closing:
            if replica is not None:
                self._live[place] = replica
                log.info("replica up", name=replica.name, pid=replica.process.pid)
                self._changed()
                since = asyncio.get_running_loop().time()
                try:
                    await replica.answer()
                finally:
                    if not self._closing:
                        del self._live[place]
                reason = f"{replica.name} ended with code {await replica.close()}"
                log.error("replica lost", reason=reason)
                # One that served for a while and died is not one that cannot be started.
                failures = 1 if asyncio.get_running_loop().time() - since > LONGEST_PAUSE_S else failures + 1
                replica = None
            if failures >= MAX_FAILURES:
                self._given_up[place] = reason
                log.critical("replica given up", place=place, reason=reason)
                if len(self._given_up) == len(self._plans):
                    self._dead.set()
                return
            await asyncio.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)))
            try:
                replica, _ = await self._launch(place, lambda line: log.info("loading", step=line))
            except (ReplicaLost, ReplicaRefused, OSError) as error:
                failures += 1
                reason = str(error)
                log.error("a replica cannot be started", place=place, error=reason)
