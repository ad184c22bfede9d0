"""Rows 29-33: callers who leave, do not read, or have no time."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable

import psutil

from infermesh.client import MeshError
from tests.fault.fleet import Fleet, fleet
from tests.fault.load import MODEL, Told, ask, quantile, streams
from tests.fault.matrix import Ground, Measured, Row
from tests.fault.rest import chat, post, session
from tests.kit.mesh import until

READERS = 60
ABORT_S = 0.25


async def no_reader(ground: Ground) -> Measured:
    """SSE readers that take nothing: each is cut off, costs a bounded piece of memory, and delays nobody."""
    # Their answers must not slow the engines down, or it is the engine that the others wait for.
    flags = ("--step-ms", "20", "--max-running", "256", "--kv-us-per-ktoken", "0.001")
    async with fleet(ground.folder, "a", "b", flags=flags) as mesh:
        gateway = psutil.Process(mesh.gateways[0].pid)
        async with streams(mesh.client, 4, tokens=50) as before:
            await asyncio.sleep(4)
        rss = gateway.memory_info().rss
        host, _, port = mesh.http().rpartition(":")
        body = json.dumps(chat(4000, stream=True)).encode()
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        mute = []
        for _ in range(READERS):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect((host, int(port)))
            one.sendall(head + body)
            mute.append(one)
        peak, at = 0.0, time.monotonic()
        async with streams(mesh.client, 4, tokens=50) as meanwhile:
            cut = float("inf")
            while time.monotonic() - at < 100:
                await asyncio.sleep(0.5)
                peak = max(peak, (gateway.memory_info().rss - rss) / 2**20)
                if (await mesh.metrics())["infermesh_gateway_in_flight"] <= 4:
                    cut = time.monotonic() - at
                    break
        for one in mute:
            one.close()
        idle = await mesh.idle(5)
        calm, late = (quantile((told.seconds for told in load.done), 0.5) for load in (before, meanwhile))
        text = (
            f"{READERS} readers: gateway at most +{peak:.0f} MB, all cut after {cut:.0f} s, engines empty {idle:.1f} s "
            f"later; others: {meanwhile}, median {late:.2f} s ({calm:.2f} s before)"
        )
        near = late <= 2 * calm + 0.5
        return Measured(peak <= 100 and cut < 100 and idle < 5 and near and not meanwhile.failures, text)


async def _leaves(mesh: Fleet, ways: dict[str, Callable[[], Awaitable[object]]], ground: Ground) -> Measured:
    """For each way to ask: so many requests, all dropped at once; how long the engines keep their work."""
    worst: dict[str, float] = {}
    for name, way in ways.items():
        took = []
        for _ in range(ground.runs(5)):
            asked = [asyncio.create_task(way()) for _ in range(8)]
            await until(lambda: _has(mesh, 8), 10)
            await asyncio.sleep(0.1)
            at = time.monotonic()
            for task in asked:
                task.cancel()
            await mesh.idle(10)
            took.append(time.monotonic() - at)
            await asyncio.gather(*asked, return_exceptions=True)
        worst[name] = max(took)
    await asyncio.sleep(0.3)
    left = await mesh.leftovers()
    text = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in worst.items())
    return Measured(max(worst.values()) <= ABORT_S and not left, f"longest: {text}; left over: {left or 'nothing'}")


async def _has(mesh: Fleet, count: int) -> bool:
    return await mesh.busy() >= count


async def left_streams(ground: Ground) -> Measured:
    async with fleet(ground.folder, "a", "b") as mesh, session() as one:

        async def grpc() -> None:
            await ask(mesh.client, Told(500, time.monotonic()))

        async def sse() -> None:
            async with one.post(f"http://{mesh.http()}/v1/chat/completions", json=chat(500, stream=True)) as reply:
                async for _ in reply.content:
                    pass

        return await _leaves(mesh, {"gRPC stream": grpc, "SSE": sse}, ground)


async def left_answers(ground: Ground) -> Measured:
    """Whoever waits for a whole answer may hang up too, and while the prompt is computed."""
    async with fleet(ground.folder, "a", "b") as mesh, session() as one:

        async def grpc() -> None:
            await mesh.client.chat("hello there", model=MODEL, max_tokens=500)

        async def rest() -> None:
            await post(one, mesh.http(), chat(500))

        async def prompt() -> None:
            await post(one, mesh.http(), chat(5, "word " * 20_000))

        return await _leaves(mesh, {"gRPC": grpc, "REST": rest, "REST in its prompt": prompt}, ground)


async def random_cancels(ground: Ground) -> Measured:
    """Callers that leave at any moment, by any door; afterwards nothing may be counted as under way anywhere."""
    draw = random.Random(32)
    total = ground.runs(10_000)
    flags = ("--step-ms", "5", "--max-running", "32", "--max-waiting", "8")
    async with fleet(ground.folder, "a", "b", flags=flags, gateway_flags=("--max-streams", "512")) as mesh:
        done = 0
        async with session() as one:

            async def some() -> None:
                nonlocal done
                while done < total:
                    done += 1
                    kind, tokens = draw.random(), draw.randrange(1, 60)
                    if kind < 0.4:
                        work = ask(mesh.client, Told(tokens, time.monotonic()))
                    elif kind < 0.6:
                        work = _stream(one, mesh.http(), tokens)
                    else:
                        work = post(one, mesh.http(), chat(tokens))
                    task = asyncio.create_task(work)
                    await asyncio.wait({task}, timeout=draw.expovariate(10))
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

            begun = time.monotonic()
            await asyncio.gather(*(some() for _ in range(96)))
            took = time.monotonic() - begun
        await mesh.idle(5)
        await asyncio.sleep(1.5)  # one heartbeat: books and reports agree
        left = await mesh.leftovers()
        told = await ask(mesh.client, Told(5, time.monotonic()))
        after = f"left over: {left or 'nothing'}; the next request: {told.error or 'served'}"
        text = f"{done} requests in {took:.0f} s; {after}"
        return Measured(not left and told.ok, text)


async def _stream(one: object, address: str, tokens: int) -> None:
    async with one.post(f"http://{address}/v1/chat/completions", json=chat(tokens, stream=True)) as reply:  # type: ignore[attr-defined]
        async for _ in reply.content:
            pass


async def short_deadline(ground: Ground) -> Measured:
    """0.3 s for a prompt that takes 1 s and more."""
    async with fleet(ground.folder, "a", "b", flags=("--prefill-tps", "5")) as mesh:
        late, reasons = [], set()
        for _ in range(ground.runs(3)):
            for _ in range(4):
                begun = time.monotonic()
                try:
                    await mesh.client.chat("one two three four five six", model=MODEL, max_tokens=2, timeout=0.3)
                    reasons.add("answered")
                except MeshError as error:
                    reasons.add(error.reason.value)
                late.append(time.monotonic() - begun - 0.3)
        idle = await mesh.idle(5)
        left = await mesh.leftovers()
        text = (
            f"{len(late)} calls: {', '.join(sorted(reasons))}, at most {max(late) * 1000:.0f} ms late; engines empty "
            f"{idle * 1000:.0f} ms after the last; left over: {left or 'nothing'}"
        )
        return Measured(reasons == {"deadline_exceeded"} and max(late) < 0.2 and idle < ABORT_S and not left, text)


ROWS = (
    Row(29, "SSE readers that do not read", "cut off, at most +100 MB, others unaffected", no_reader, 240),
    Row(30, "client leaves a stream", "out of the engine within 250 ms, every counter 0", left_streams),
    Row(
        31,
        "client leaves a call that is not streamed",
        "out of the engine within 250 ms, every counter 0",
        left_answers,
    ),
    Row(32, "10,000 random cancels", "every counter back to 0", random_cancels, 900),
    Row(33, "deadline shorter than the prompt takes", "DEADLINE_EXCEEDED on time, no work left behind", short_deadline),
)
