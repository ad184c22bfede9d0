"""Rows 52, 53, 55-59: callers who abuse the wire. One gateway, one well-behaved caller, who must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import psutil

from infermesh.transport import channel_options
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc
from tests.fault.fleet import Fleet, fleet
from tests.fault.load import MODEL, Load, quantile, streams
from tests.fault.matrix import Ground, Measured, Row
from tests.fault.rest import chat, post, raw, session

CHAT = "/v1/chat/completions"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@asynccontextmanager
async def abused(ground: Ground) -> AsyncIterator[tuple[Fleet, Load, psutil.Process]]:
    """A mesh with a caller whose every request must go well meanwhile; judge with `_calm`."""
    async with fleet(ground.folder, "a", "b", flags=("--step-ms", "10")) as mesh:
        gateway = psutil.Process(mesh.gateways[0].pid)
        async with streams(mesh.client, 2, tokens=10) as load:
            await asyncio.sleep(1.5)
            yield mesh, load, gateway
            await asyncio.sleep(0.5)


def _grown(gateway: psutil.Process, before: int) -> float:
    """MiB."""
    return float(gateway.memory_info().rss - before) / 2**20


async def _status(call: object) -> str:
    try:
        async for _ in call:  # type: ignore[attr-defined]
            pass
        return "OK"
    except grpc.aio.AioRpcError as error:
        return error.code().name
    except (ValueError, TypeError) as error:
        return type(error).__name__


async def oversized(ground: Ground) -> Measured:
    async with abused(ground) as (mesh, load, gateway):
        before = gateway.memory_info().rss
        options = channel_options(max_send_message_length=-1)
        async with grpc.aio.insecure_channel(mesh.grpc, options=options) as channel:
            stub = language_model_pb2_grpc.LanguageModelServiceStub(channel)
            message = lm.Message(role=lm.ROLE_USER, content="x" * (20 << 20))
            big = await _status(stub.Chat(lm.ChatRequest(model=MODEL, messages=[message])))
        async with session() as one:
            rest = (await post(one, mesh.http(), chat(1, "x" * (20 << 20)))).status
        frame = _headers(1) + _frame(0, 0, 1, b"\x00" + struct.pack(">I", (1 << 31) - 1) + b"x" * 1000)
        told = await _h2(mesh.grpc, frame, 2.0)
        grown = _grown(gateway, before)
    text = (
        f"20 MiB by gRPC: {big}, by REST: HTTP {rest}; a prefix of 2 GiB: {len(told)} bytes told back; "
        f"{grown:+.0f} MB; others: {load}"
    )
    return Measured(big == "RESOURCE_EXHAUSTED" and rest == 413 and grown < 100 and not load.failures, text)


async def bombs(ground: Ground) -> Measured:
    async with abused(ground) as (mesh, load, gateway):
        before = gateway.memory_info().rss
        async with grpc.aio.insecure_channel(
            mesh.grpc, options=channel_options(max_send_message_length=-1), compression=grpc.Compression.Gzip
        ) as channel:
            stub = language_model_pb2_grpc.LanguageModelServiceStub(channel)
            message = lm.Message(role=lm.ROLE_USER, content="0" * (64 << 20))
            bomb = await _status(stub.Chat(lm.ChatRequest(model=MODEL, messages=[message])))
        packed = gzip.compress(b"0" * (256 << 20), 6)
        async with session() as one:
            headers = {"content-encoding": "gzip"}
            rest = await post(one, mesh.http(), packed, headers=headers)
        grown = _grown(gateway, before)
    text = (
        f"64 MiB of zeros by gRPC: {bomb}; {len(packed) >> 10} KiB that are 256 MiB by REST: HTTP {rest.status} "
        f"{rest.code}; {grown:+.0f} MB; others: {load}"
    )
    refused = bomb == "RESOURCE_EXHAUSTED" and rest.status in (400, 413, 415)
    return Measured(refused and grown < 100 and not load.failures, text)


async def metadata(ground: Ground) -> Measured:
    """What gRPC's own client does not send is refused here already; the rest must be refused there, each time alike."""
    cases = {
        "1 KiB": (("x-a", "a" * 1000),),
        "17 KiB": (("x-a", "a" * 17_000),),
        "40 KiB": (("x-a", "a" * 40_000),),
        "1000 keys": tuple((f"x-{number}", "a" * 10) for number in range(1000)),
        "odd request id": (("x-request-id", "a b/<script>" * 20),),
    }
    async with abused(ground) as (mesh, load, _):
        told: dict[str, set[str]] = {}
        stub = language_model_pb2_grpc.LanguageModelServiceStub
        async with grpc.aio.insecure_channel(mesh.grpc, options=channel_options()) as channel:
            message = lm.Message(role=lm.ROLE_USER, content="hi")
            request = lm.ChatRequest(model=MODEL, messages=[message], sampling=lm.Sampling(max_tokens=1))
            for name, pairs in cases.items():
                told[name] = {await _status(stub(channel).Chat(request, metadata=pairs)) for _ in range(5)}
        crlf = _headers(1, extra=[(b"x-a", b"a\r\nx-b: c")])
        wire = await _h2(mesh.grpc, crlf, 1.0)
    listed = ", ".join(f"{name}: {'/'.join(sorted(codes))}" for name, codes in told.items())
    text = f"{listed}; CRLF: {len(wire)} bytes back"
    small = told["1 KiB"] == {"OK"} and told["odd request id"] <= {"OK", "INVALID_ARGUMENT"}
    refused = all("OK" not in told[name] and len(told[name]) == 1 for name in ("17 KiB", "40 KiB", "1000 keys"))
    return Measured(small and refused and not load.failures, f"{text}; others: {load}")


async def rapid_reset(ground: Ground) -> Measured:
    """HEADERS, DATA and RST_STREAM as fast as the wire takes them, on one connection after the other."""
    async with abused(ground) as (mesh, load, gateway):
        calm = quantile((told.seconds for told in load.done), 0.99)
        before = gateway.memory_info().rss
        sent, until = 0, time.monotonic() + ground.seconds(5)
        at = time.monotonic()
        host, _, port = mesh.grpc.rpartition(":")
        while time.monotonic() < until:
            reader, writer = await asyncio.open_connection(host, int(port))
            drain = asyncio.create_task(_read_all(reader))
            with contextlib.suppress(ConnectionError):
                writer.write(PREFACE + _frame(4, 0, 0, b""))
                stream = 1
                while time.monotonic() < until and stream < 40_000 and not drain.done():
                    burst = b"".join(
                        _headers(stream + 2 * n) + _frame(3, 0, stream + 2 * n, struct.pack(">I", 8)) for n in range(50)
                    )
                    writer.write(burst)
                    await writer.drain()
                    stream += 100
                    sent += 50
                    await asyncio.sleep(0)
            writer.transport.abort()
            await drain
        took = time.monotonic() - at
        during = [told for told in load.between(at, time.monotonic())]
        late = quantile((told.seconds for told in during), 0.99)
        grown = _grown(gateway, before)
    cancelled = sum(error.startswith("cancelled") for error in load.failures)
    text = (
        f"{sent / took:.0f} resets a second for {took:.0f} s: {cancelled} CANCELLED for others, {load}; their p99 "
        f"{late:.2f} s ({calm:.2f} s before), gateway {grown:+.0f} MB"
    )
    return Measured(not load.failures and bool(during) and late < calm + 0.5 and grown < 150 and sent > 5000, text)


async def _read_all(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _headers(stream: int, *, extra: list[tuple[bytes, bytes]] | None = None) -> bytes:
    """HEADERS of a gRPC call, every field a literal that is not indexed (RFC 7541, 6.2.2)."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/infermesh.v1.LanguageModelService/Chat"),
        (b":authority", b"t"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *(extra or []),
    ]
    block = b"".join(b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in fields)
    return _frame(1, 4, stream, block)


async def _h2(address: str, frames: bytes, wait_s: float) -> bytes:
    """What a server says within the time to a connection that sends these frames."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + _frame(4, 0, 0, b"") + frames)
    told = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(wait_s):
            while data := await reader.read(1 << 16):
                told += data
    writer.transport.abort()
    return told


async def slow_loris(ground: Ground) -> Measured:
    """Headers and bodies a byte at a time, and a thousand connections that say nothing at all."""
    async with abused(ground) as (mesh, load, gateway):
        before = gateway.memory_info().rss
        host, _, port = mesh.http().rpartition(":")
        closed: dict[str, list[float]] = {"headers": [], "body": [], "silent": []}
        starts = {
            "headers": b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nx-a: ",
            "body": b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 5000\r\n\r\n{",
            "silent": b"",
        }

        async def slow(kind: str) -> None:
            begun = time.monotonic()
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(starts[kind])
                reading = asyncio.create_task(_read_all(reader))
                while not reading.done() and time.monotonic() - begun < 30:
                    if kind != "silent":
                        writer.write(b"a")
                    await asyncio.wait({reading}, timeout=1.0)
                writer.transport.abort()
                await reading
            except ConnectionError:
                pass
            closed[kind].append(time.monotonic() - begun)

        at = time.monotonic()
        await asyncio.gather(*(slow("headers") for _ in range(100)), *(slow("body") for _ in range(100)),
                             *(slow("silent") for _ in range(800)))  # fmt: skip
        grown = _grown(gateway, before)
        late = quantile((told.seconds for told in load.between(at, time.monotonic())), 0.99)
        calm = quantile((told.seconds for told in load.between(0, at)), 0.99)
    longest = {kind: max(times) for kind, times in closed.items()}
    text = (
        f"1,000 connections; closed after at most {', '.join(f'{kind} {s:.1f} s' for kind, s in longest.items())}; "
        f"{grown:+.0f} MB; others: {load}, p99 {late:.2f} s ({calm:.2f} s before)"
    )
    return Measured(max(longest.values()) < 13 and grown < 100 and not load.failures, text)


async def smuggling(ground: Ground) -> Measured:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\n"
    cases = {
        "CL and TE": head + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "two CL": head + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        "bare LF": b"POST /v1/chat/completions HTTP/1.1\nhost: t\ncontent-length: 0\n\n",
        "folded header": head + b"x-a: a\r\n b\r\ncontent-length: 0\r\n\r\n",
        "space before colon": head + b"content-length : 3\r\n\r\nabc",
        "chunk of no size": head + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        "NUL in a header": head + b"x-a: a\x00b\r\ncontent-length: 0\r\n\r\n",
        "negative CL": head + b"content-length: -1\r\n\r\n",
    }
    async with abused(ground) as (mesh, load, _):
        told = {}
        for name, data in cases.items():
            try:
                told[name] = (await raw(mesh.http(), data)).split(b" ", 2)[1:2]
            except (TimeoutError, ConnectionError) as error:
                told[name] = [type(error).__name__.encode()]
    words = {name: (got[0].decode() if got else "closed") for name, got in told.items()}
    text = ", ".join(f"{name} {word}" for name, word in words.items())
    return Measured(all(word in ("400", "closed") for word in words.values()) and not load.failures, f"{text}; {load}")


ROWS = (
    Row(52, "20 MiB messages, a prefix of 2 GiB", "RESOURCE_EXHAUSTED / 413, memory flat", oversized),
    Row(53, "gzip bombs, gRPC and REST", "refused, less than 100 MB", bombs),
    Row(55, "large, many and odd metadata", "refused, each time alike; others unaffected", metadata),
    Row(56, "rapid reset", "0 CANCELLED for others, their p99 at most 0.5 s more on 2 cores", rapid_reset),
    Row(
        58, "slow headers and bodies, 800 silent connections", "closed within some 10 s, others unaffected", slow_loris
    ),
    Row(59, "CL+TE, two lengths, bare LF, folding …", "400 or closed", smuggling),
)
