"""The embedded registry's server: a thin grpc.aio shell around `Directory`. One process a mesh hosts it (DESIGN §5)."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Final

import grpc

from infermesh.errors import MeshError, Reason, to_trailers
from infermesh.v1 import registry_pb2 as pb
from infermesh.v1 import registry_pb2_grpc as pb_grpc
from registry.directory import Directory, Limits, Line, superseded_text

log = logging.getLogger("infermesh.registry.host")

TICK_S: Final = 0.25
GATHER_S: Final = 0.02  # changes that come together go out together
MAX_WATCHERS: Final = 1024


class EmbeddedRegistry(pb_grpc.RegistryServiceServicer):
    """Use as an async context manager around the server's life:

        async with EmbeddedRegistry() as registry:
            pb_grpc.add_RegistryServiceServicer_to_server(registry, server)

    `authorize` judges the `authorization` metadata of `Register` (None when none was sent) and raises MeshError; None
    lets everybody in. Leaving the context ends all streams, so that `server.stop` has nothing to wait for.
    """

    def __init__(self, *, authorize: Callable[[str | None], None] | None = None, limits: Limits | None = None) -> None:
        self._authorize = authorize
        self._limits = limits or Limits()
        self._sessions = itertools.count(1)
        self._superseded: dict[int, asyncio.Event] = {}
        self._watchers: set[asyncio.Event] = set()
        self._closing = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self.directory: Directory

    async def __aenter__(self) -> EmbeddedRegistry:
        self.directory = Directory(self._now(), self._limits)
        self._ticker = asyncio.create_task(self._tick(), name="registry-tick")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._wake()
        if self._ticker:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            before = self.directory.revision
            self.directory.tick(self._now())
            if self.directory.revision != before:
                self._wake()

    async def Register(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        # Not a generator: it has to watch its stream and two events at once, and write when one of them comes.
        await self._admit(context)
        session = next(self._sessions)
        superseded = self._superseded[session] = asyncio.Event()
        reading: asyncio.Future[Any] | None = None
        endings = [asyncio.create_task(superseded.wait()), asyncio.create_task(self._closing.wait())]
        try:
            while True:
                reading = asyncio.ensure_future(context.read())
                await asyncio.wait([reading, *endings], return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    if superseded.is_set():
                        await context.write(pb.RegisterResponse(rejected_reason="superseded by a later process"))
                    return
                frame = reading.result()
                if frame is grpc.aio.EOF or not await self._take(session, frame, context):
                    return
        finally:
            for waiter in (reading, *endings):
                if waiter:
                    waiter.cancel()
            del self._superseded[session]
            self.directory.lose(session, self._now())
            self._wake()

    async def _take(self, session: int, frame: pb.RegisterRequest, context: Any) -> bool:
        """One frame of a registration; false when it was the last."""
        if frame.goodbye:
            self.directory.leave(session)
            self._wake()
            return False
        if not frame.HasField("registration"):
            before = self.directory.revision
            self.directory.renew(session, self._now())
            if self.directory.revision != before:
                self._wake()
            return True
        line = to_line(frame.registration)
        joined = self.directory.join(session, line, self._now())
        if joined.superseded is not None and joined.superseded in self._superseded:
            log.warning("%s", superseded_text(line.id, line.incarnation))
            self._superseded[joined.superseded].set()
        if not joined.refused:
            self._wake()
        await context.write(pb.RegisterResponse(accepted=not joined.refused, rejected_reason=joined.refused))
        return not joined.refused

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        if len(self._watchers) >= MAX_WATCHERS:
            await _abort(context, MeshError(Reason.INSTANCE_FULL, f"{MAX_WATCHERS} watchers already"))
        services = tuple(request.services[:64])
        changed = asyncio.Event()
        changed.set()
        self._watchers.add(changed)
        sent = 0
        try:
            while not self._closing.is_set():
                await changed.wait()
                await asyncio.sleep(GATHER_S if sent else 0)
                changed.clear()
                if self.directory.revision != sent:
                    sent = self.directory.revision
                    yield self._whole(services)
        finally:
            self._watchers.discard(changed)

    def _whole(self, services: tuple[str, ...]) -> pb.WatchResponse:
        return pb.WatchResponse(
            entries=[
                pb.Registered(registration=from_line(item.line), suspect=item.suspect)
                for item in self.directory.listed(services)
            ],
            revision=self.directory.revision,
            age_ms=min(round(self.directory.age_s(self._now()) * 1000), 0xFFFFFFFF),
        )

    async def _admit(self, context: Any) -> None:
        if self._authorize is None:
            return
        sent = dict(context.invocation_metadata() or ()).get("authorization")
        try:
            self._authorize(sent if isinstance(sent, str) else None)
        except MeshError as error:
            await _abort(context, error)


async def _abort(context: Any, error: MeshError) -> None:
    await context.abort(error.row.grpc, error.message, to_trailers(error))


def to_line(registration: pb.Registration) -> Line:
    return Line(
        registration.service, registration.id, registration.host, registration.port, dict(registration.metadata)
    )


def from_line(line: Line) -> pb.Registration:
    return pb.Registration(service=line.service, id=line.id, host=line.host, port=line.port, metadata=line.metadata)
