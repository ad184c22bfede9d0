"""What only the embedded registry has: the operator's key, several addresses, streams that freeze; and presence."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest

from infermesh.errors import REASON_KEY, MeshError, Reason
from infermesh.transport import channel_options
from infermesh.v1 import registry_pb2 as pb
from infermesh.v1 import registry_pb2_grpc as pb_grpc
from registry.address import open_registry
from registry.directory import Limits
from registry.embedded_keep import Stay
from registry.endpoint import Endpoint
from registry.port import Registry, RegistryError
from registry.presence import Departure, Presence, present
from tests.kit.mesh import until
from tests.kit.registries import LEAVING_S, EmbeddedBackend, Watching, ids, instance


def endpoint(id: str = "a") -> Endpoint:
    return Endpoint(id, "llm", "127.0.0.1", 80, "m", incarnation=secrets.randbits(64))


@contextlib.asynccontextmanager
async def hosted(**options: Any) -> AsyncIterator[EmbeddedBackend]:
    backend = EmbeddedBackend(**options)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Registry]:
    registry = open_registry(url, **options)
    try:
        yield registry
    finally:
        await registry.close()


@contextlib.asynccontextmanager
async def watched(url: str) -> AsyncIterator[Watching]:
    async with opened(url) as registry:
        watching = Watching(registry)
        try:
            yield watching
        finally:
            await watching.close()


def only(key: str) -> Callable[[str | None], None]:
    def authorize(authorization: str | None) -> None:
        if authorization is None:
            raise MeshError(Reason.UNAUTHENTICATED, "an API key is needed")
        if authorization != f"Bearer {key}":
            raise MeshError(Reason.PERMISSION_DENIED, "this needs the operator's key")

    return authorize


async def test_registering_needs_the_operators_key_and_watching_does_not() -> None:
    async with hosted(authorize=only("right")) as backend, watched(backend.url) as watching:
        for key, why in [(None, "API key"), ("wrong", "operator")]:
            async with opened(backend.url, operator_key=key) as registry:
                with pytest.raises(RegistryError, match=why):
                    await registry.register(endpoint())
        async with opened(backend.url, operator_key="right") as registry:
            await registry.register(endpoint())
            await watching.until(lambda s: ids(s) == {"a"})
        async with grpc.aio.insecure_channel(backend.url.removeprefix("mesh://"), options=channel_options()) as channel:
            call = pb_grpc.RegistryServiceStub(channel).Register()
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
            assert (REASON_KEY, "unauthenticated") in tuple(await call.trailing_metadata())


async def test_a_full_registry_says_so() -> None:
    async with hosted(limits=Limits(entries=1)) as backend, opened(backend.url) as registry:
        await registry.register(endpoint("a"))
        with pytest.raises(RegistryError, match="full"):
            await registry.register(endpoint("b"))


async def test_one_of_two_registries_is_enough() -> None:
    async with hosted() as one, hosted() as two:
        url = f"{one.url},{two.url.removeprefix('mesh://')}"
        async with watched(url) as watching, opened(url) as registry:
            await registry.register(endpoint("a"))
            await watching.until(lambda s: ids(s) == {"a"})
            known_from = len(watching.seen) - 1
            await one.kill()
            await asyncio.sleep(1)
            await registry.register(endpoint("b"))
            await watching.until(lambda s: ids(s) == {"a", "b"})
            await one.start()
            async with watched(one.url) as late:
                await late.until(lambda s: ids(s) == {"a", "b"})
            await asyncio.sleep(2)  # the watch of both finds it again, too
            await two.kill()
            await asyncio.sleep(1)
            assert ids(watching.last) == {"a", "b"} and not watching.last.stale
            assert all("a" in ids(s) and not s.stale for _, s in watching.seen[known_from:])
            await one.kill()
            await watching.until(lambda s: s.stale and ids(s) == {"a", "b"})
            await two.start()
            await watching.until(lambda s: not s.stale and ids(s) == {"a", "b"})
            await registry.deregister("a")
            await registry.deregister("b")


async def test_a_frozen_instance_is_suspect_and_thaws() -> None:
    async with hosted() as backend, watched(backend.url) as watching:
        async with instance(backend.url, "a") as process, instance(backend.url, "b"):
            await watching.until(lambda s: ids(s) == {"a", "b"})
            process.send_signal(signal.SIGSTOP)
            took = await watching.until(lambda s: ids(s) == {"b"})
            print(f"frozen -> suspect {took:.2f} s")
            await asyncio.sleep(4)
            process.send_signal(signal.SIGCONT)
            took = await watching.until(lambda s: ids(s) == {"a", "b"})
            print(f"thawed -> back {took:.2f} s")


async def test_a_young_directory_says_so_and_grows_up() -> None:
    begun = time.monotonic()
    async with hosted() as backend, watched(backend.url) as watching:
        await watching.until(lambda s: not s.stale and not s.young)
        assert any(s.young for _, s in watching.seen) and time.monotonic() - begun > 2.9


async def test_the_older_process_is_told() -> None:
    async with hosted() as backend:
        async with grpc.aio.insecure_channel(backend.url.removeprefix("mesh://"), options=channel_options()) as channel:
            stub = pb_grpc.RegistryServiceStub(channel)
            line = pb.Registration(service="infermesh-llm", id="a", host="h", port=1, metadata={"incarnation": "1"})
            old, new = stub.Register(), stub.Register()
            await old.write(pb.RegisterRequest(registration=line))
            assert (await old.read()).accepted
            line.metadata["incarnation"] = "2"
            await new.write(pb.RegisterRequest(registration=line))
            assert (await new.read()).accepted
            told = await old.read()
            assert not told.accepted and told.rejected_reason.startswith("superseded")
            assert await old.read() is grpc.aio.EOF
            new.cancel()


async def test_presence_does_things_in_order() -> None:
    said: list[str] = []

    async def serving(on: bool) -> None:
        said.append(f"serving {on}")

    async def drain(grace_s: float) -> None:
        said.append(f"drain {grace_s:g}")

    async with hosted() as backend, watched(backend.url) as watching, opened(backend.url) as registry:
        leave = Departure(settle_s=0.2, grace_s=7)
        async with present([registry], endpoint(), serving=serving, drain=drain, departure=leave) as presence:
            assert said == ["serving True"]
            await watching.until(lambda s: ids(s) == {"a"})
            await presence.renew(weight=2.0)
            await watching.until(lambda s: s.entries[0].endpoint.weight == 2.0)
            begun = time.monotonic()
        assert time.monotonic() - begun >= 0.2
        assert said == ["serving True", "serving False", "drain 7"]
        await watching.until(lambda s: not s.entries, LEAVING_S)


async def test_presence_leaves_early_once_and_undoes_a_refusal() -> None:
    said: list[bool] = []

    async def serving(on: bool) -> None:
        said.append(on)

    async def drain(_: float) -> None:
        pass

    async with hosted() as backend, hosted(authorize=only("k")) as locked, watched(backend.url) as watching:
        async with opened(backend.url) as good, opened(locked.url) as bad:
            presence = Presence([good], endpoint(), serving)
            await presence.enter()
            await watching.until(lambda s: ids(s) == {"a"})
            await asyncio.gather(presence.leave(), presence.leave())
            await presence.renew(weight=3.0)
            await watching.until(lambda s: not s.entries, LEAVING_S)
            assert presence.left.is_set() and said == [True, False]
            with pytest.raises(RegistryError, match="API key"):
                async with present(
                    [good, bad], replace(endpoint(), id="b"), serving=serving, drain=drain, departure=Departure(0, 0)
                ):
                    raise AssertionError("not to be reached")
            await asyncio.sleep(0.3)
            assert not watching.last.entries
            assert said == [True, False, True, False]


async def test_a_stream_that_the_other_side_cancels_is_opened_again() -> None:
    """grpc raises CancelledError then, out of whatever was under way; it must not end the keeper for good."""

    class Cancelled:
        def __init__(self) -> None:
            self.writes = 0

        async def write(self, frame: object) -> None:
            self.writes += 1
            if self.writes > 1:
                raise asyncio.CancelledError

        async def read(self) -> object:
            await asyncio.sleep(60)
            return None

        def cancel(self) -> None:
            pass

    class Stub:
        def __init__(self) -> None:
            self.calls = 0

        def Register(self, metadata: object = None) -> Cancelled:
            self.calls += 1
            return Cancelled()

    stub = Stub()
    stay = Stay(stub, "infermesh", Endpoint("a", "llm", "127.0.0.1", 1, "m"), None)
    await until(lambda: stub.calls > 1, 10)
    await stay.end()
