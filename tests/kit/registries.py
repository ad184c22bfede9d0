"""Both registries behind one face, so that one suite judges them alike."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import urllib.error
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import grpc

from infermesh.transport import channel_options, server_options
from infermesh.v1 import registry_pb2 as pb
from infermesh.v1 import registry_pb2_grpc as pb_grpc
from registry.directory import Limits
from registry.host import EmbeddedRegistry
from registry.port import Registry, Snapshot
from tests.kit.consul import ROOT, ConsulServer

PATIENCE_S = 30.0  # of who only waits for what comes; a machine may be busy
LEAVING_S = 8.0  # a loss is doubted for 10 s, a departure is not


class Backend(Protocol):
    url: str

    async def kill(self) -> None: ...

    async def start(self) -> None:
        """After `kill`: the same address; nothing is known."""

    async def put(self, service: str, id: str, host: str, port: int, metadata: Mapping[str, str]) -> bool:
        """Registers what nobody checked. False: this registry itself will not have it."""

    async def close(self) -> None: ...


class ConsulBackend:
    def __init__(self) -> None:
        self.server = ConsulServer()
        self.url = self.server.url

    async def start(self) -> None:
        await asyncio.to_thread(self.server.start)

    async def kill(self) -> None:
        await asyncio.to_thread(self.server.kill)

    async def put(self, service: str, id: str, host: str, port: int, metadata: Mapping[str, str]) -> bool:
        # Into the catalogue, under another node: the agent checks a little, and would tidy up its own node.
        line = {"Service": service, "ID": id, "Address": host, "Port": port, "Meta": dict(metadata)}
        body = {"Node": "elsewhere", "Address": "127.0.0.1", "Service": line}
        try:
            await asyncio.to_thread(self.server.put, "/v1/catalog/register", body)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        return True

    async def close(self) -> None:
        await asyncio.to_thread(self.server.close)


class EmbeddedBackend:
    def __init__(
        self, *, authorize: Callable[[str | None], None] | None = None, limits: Limits | None = None, port: int = 0
    ) -> None:
        self.url = ""
        self._authorize = authorize
        self._limits = limits
        self._port = port
        self._stack = contextlib.AsyncExitStack()
        self._held: list[Any] = []

    async def start(self) -> None:
        server = grpc.aio.server(options=server_options())
        registry = EmbeddedRegistry(authorize=self._authorize, limits=self._limits)
        pb_grpc.add_RegistryServiceServicer_to_server(registry, server)
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        self.url = f"mesh://127.0.0.1:{self._port}"
        self._stack.push_async_callback(server.stop, 0)
        await self._stack.enter_async_context(registry)
        await server.start()

    async def kill(self) -> None:
        await self._stack.aclose()

    async def put(self, service: str, id: str, host: str, port: int, metadata: Mapping[str, str]) -> bool:
        channel = grpc.aio.insecure_channel(self.url.removeprefix("mesh://"), options=channel_options())
        call = pb_grpc.RegistryServiceStub(channel).Register()
        self._held.append((channel, call))
        line = pb.Registration(service=service, id=id, host=host, port=port, metadata=dict(metadata))
        await call.write(pb.RegisterRequest(registration=line))
        return bool((await call.read()).accepted)

    async def close(self) -> None:
        for channel, call in self._held:
            call.cancel()
            await channel.close()
        await self.kill()


class Watching:
    """Reads a watch in the background and remembers every snapshot, with its time."""

    def __init__(self, registry: Registry, kinds: tuple[str, ...] = ()) -> None:
        self.seen: list[tuple[float, Snapshot]] = []
        self._news = asyncio.Event()
        self._registry = registry
        self._kinds = kinds
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with contextlib.aclosing(self._registry.watch(self._kinds)) as snapshots:  # type: ignore[type-var]
            async for snapshot in snapshots:
                self.seen.append((time.monotonic(), snapshot))
                self._news.set()

    @property
    def last(self) -> Snapshot:
        return self.seen[-1][1]

    async def until(self, holds: Callable[[Snapshot], bool], within_s: float = PATIENCE_S) -> float:
        """Seconds from now until a snapshot fulfils the condition. `within_s` is for what is promised, or would come
        about by other means later on."""
        start = time.monotonic()
        while not (self.seen and holds(self.last)):
            left = start + within_s - time.monotonic()
            assert left > 0, f"not within {within_s} s; last: {self.seen[-1:]}"
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)
        return time.monotonic() - start

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def first_seen(watching: Watching, id: str) -> Snapshot:
    """The first snapshot that lists it."""
    return next(s for _, s in watching.seen if id in ids(s, passing=False))


def ids(snapshot: Snapshot, *, passing: bool = True) -> set[str]:
    """Ids of the usable entries (those that pass, unless told otherwise)."""
    return {entry.endpoint.id for entry in snapshot.entries if entry.passing or not passing}


@contextlib.asynccontextmanager
async def instance(url: str, id: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A registered process of its own; see `registered_instance`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kit.registered_instance", url, id),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        assert line.startswith(b"ready"), line
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        # The pipe's transport must be gone before the loop is.
        process._transport.close()  # type: ignore[attr-defined]
