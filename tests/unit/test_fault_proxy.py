"""The fault proxy does to bytes what it is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.kit.fault_proxy import FaultProxy, Faults


@asynccontextmanager
async def echo() -> AsyncIterator[FaultProxy]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, FaultProxy() as proxy:
        proxy.target = server.sockets[0].getsockname()[:2]
        yield proxy


async def ask(proxy: FaultProxy, data: bytes, timeout_s: float = 5.0) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.readexactly(len(data)), timeout_s)
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    ("faults", "least_s"),
    [
        (Faults(), 0.0),
        (Faults(latency_s=0.1, jitter_s=0.02), 0.15),
        (Faults(rate=50_000), 0.15),
        (Faults(slice=7), 0.0),
        (Faults(latency_s=0.2, up=False), 0.19),
    ],
)
async def test_bytes_arrive_whole_and_late(faults: Faults, least_s: float) -> None:
    async with echo() as proxy:
        proxy.faults = faults
        data = bytes(range(256)) * 40
        begun = time.monotonic()
        assert await ask(proxy, data) == data
        assert time.monotonic() - begun >= least_s


async def test_bytes_are_changed() -> None:
    async with echo() as proxy:
        proxy.faults = Faults(corrupt=0.01, down=False)
        data = bytes(20_000)
        changed = sum(byte != 0 for byte in await ask(proxy, data))
        assert 100 < changed < 320


@pytest.mark.parametrize("faults", [Faults(drop=True), Faults(drop=True, down=False), Faults(drop=True, up=False)])
async def test_a_black_hole_says_nothing(faults: Faults) -> None:
    async with echo() as proxy:
        proxy.faults = faults
        with pytest.raises(TimeoutError):
            await ask(proxy, b"hello", 0.3)


async def test_connections_are_reset_refused_and_half_closed() -> None:
    async with echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        assert proxy.half_close() == 1
        assert await reader.read() == b""
        writer.transport.abort()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        assert proxy.reset() >= 1
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.transport.abort()
        proxy.faults = Faults(refuse=True)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await ask(proxy, b"a")
