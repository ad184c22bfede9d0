"""A TCP proxy that breaks connections on demand: what the kernel here cannot do to packets, done to bytes.

async with FaultProxy() as proxy:
    proxy.target = ("127.0.0.1", port)
    proxy.faults = Faults(latency_s=0.2, jitter_s=0.1)     # holds for bytes from now on
    proxy.reset(), proxy.half_close() ...                  # what happens once, to every connection
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

CHUNK = 16 << 10
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close sends RST


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to bytes on the way. `up` and `down` limit it to one direction: towards the target, and back.

    `latency_s` ± `jitter_s` delays, in order; `rate` is bytes a second; `slice` cuts writes to so many bytes;
    `corrupt` is the chance of a byte to be changed; `drop` swallows everything while connections stay open, new ones
    included; `refuse` answers new connections with a reset.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    rate: float = 0.0
    slice: int = 0
    corrupt: float = 0.0
    drop: bool = False
    refuse: bool = False
    up: bool = True
    down: bool = True

    def hold(self, towards: str) -> bool:
        return self.up if towards == "up" else self.down


@dataclass(eq=False)
class _Pipe:
    """One direction of one connection: a reader that fills a bounded queue, and a writer that is late on purpose."""

    proxy: FaultProxy
    towards: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    queue: asyncio.Queue[tuple[float, bytes]] = field(default_factory=lambda: asyncio.Queue(64))

    async def fill(self) -> None:
        clock, due = asyncio.get_running_loop().time, 0.0
        while data := await self.reader.read(CHUNK):
            faults = self.proxy.faults
            if not faults.hold(self.towards):
                await self.queue.put((0.0, data))
            elif not faults.drop:
                late = faults.latency_s + self.proxy.draw.uniform(-faults.jitter_s, faults.jitter_s)
                due = max(due, clock() + max(0.0, late))  # TCP keeps the order, so a late byte holds up the next
                await self.queue.put((due, self.proxy.spoil(data, faults.corrupt)))
        await self.queue.put((due, b""))

    async def drain(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due, data = await self.queue.get()
            if (wait := due - clock()) > 0:
                await asyncio.sleep(wait)
            if not data:
                with suppress(OSError):
                    self.writer.write_eof()
                return
            faults = self.proxy.faults
            held = faults.hold(self.towards)
            piece = (faults.slice if held else 0) or len(data)
            if held and faults.rate:
                piece = max(1, min(piece, int(faults.rate / 20)))
            for start in range(0, len(data), piece):
                part = data[start : start + piece]
                self.writer.write(part)
                await self.writer.drain()
                self.proxy.passed[self.towards] += len(part)
                if held and faults.rate:
                    await asyncio.sleep(len(part) / faults.rate)
                elif faults.slice:
                    await asyncio.sleep(0)


class FaultProxy:
    """Listens on a free port of `host`; `target` may be set later, until then connections are refused."""

    def __init__(self, host: str = "127.0.0.1", *, seed: int = 1) -> None:
        self.faults = Faults()
        self.target: tuple[str, int] | None = None
        self.draw = random.Random(seed)
        self.passed = {"up": 0, "down": 0}  # bytes
        self.port = 0
        self._host = host
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"{self._host}:{self.port}"

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in tuple(self._writers):
            writer.transport.abort()

    def reset(self) -> int:
        """RST to both ends of every connection. Returns how many connections there were."""
        return self._each(_rst) // 2

    def half_close(self) -> int:
        """FIN to both ends; what still comes in is still passed on."""

        def finish(writer: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                writer.write_eof()

        return self._each(finish) // 2

    def spoil(self, data: bytes, chance: float) -> bytes:
        """Changes bytes: geometric gaps, so that the cost follows the number of changes."""
        if chance <= 0:
            return data
        made, at = bytearray(data), int(self.draw.expovariate(chance))
        while at < len(made):
            made[at] ^= self.draw.randrange(1, 256)
            at += 1 + int(self.draw.expovariate(chance))
        return bytes(made)

    def _each(self, what: Callable[[asyncio.StreamWriter], None]) -> int:
        writers = tuple(self._writers)
        for writer in writers:
            what(writer)
        return len(writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.target is None or self.faults.refuse:
            _rst(writer)
            return
        try:
            far_reader, far = await asyncio.open_connection(*self.target)
        except OSError:
            _rst(writer)
            return
        both = (writer, far)
        for one in both:
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writers.update(both)
        up, down = _Pipe(self, "up", reader, far), _Pipe(self, "down", far_reader, writer)
        running = deque(asyncio.create_task(step()) for pipe in (up, down) for step in (pipe.fill, pipe.drain))
        try:
            # One direction may end before the other, but an error ends both.
            await asyncio.gather(*running)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for job in running:
                job.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for one in both:
                self._writers.discard(one)
                one.transport.abort()


def _rst(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
    writer.transport.abort()
