"""Load for the bench: closed-loop clients over gRPC and REST, each run bounded in count and time.

A run gives latencies [s] and what came back; the client shares the machine with the servers, so only ratios within one
run mean something.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
import grpc.aio
import orjson

from infermesh.transport import channel_options
from infermesh.v1 import language_model_pb2 as lm

CHAT = "/infermesh.v1.LanguageModelService/Chat"
LIMIT_S = 60.0


@dataclass(slots=True)
class Run:
    latencies: list[float] = field(default_factory=list)
    events: int = 0
    wall_s: float = 0.0

    @property
    def rps(self) -> float:
        return len(self.latencies) / self.wall_s

    def quantile_ms(self, q: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1000


def chat_request(model: str, tokens: int, *, unary: bool) -> lm.ChatRequest:
    request = lm.ChatRequest(model=model, messages=[lm.Message(role=lm.ROLE_USER, content="How fast is this?")])
    request.sampling.max_tokens = tokens
    if unary:
        request.delivery.min_interval_ms = 250
    return request


async def closed_loop(one: Callable[[], Awaitable[int]], clients: int, count: int) -> Run:
    """`clients` callers, one request after the other, `count` in all. `one` returns how many events it read."""
    run = Run()
    left = count
    started = time.perf_counter()

    async def client() -> None:
        nonlocal left
        while left > 0 and time.perf_counter() - started < LIMIT_S:
            left -= 1
            begun = time.perf_counter()
            events = await one()
            run.events += events
            run.latencies.append(time.perf_counter() - begun)

    await asyncio.gather(*(client() for _ in range(clients)))
    run.wall_s = time.perf_counter() - started
    return run


async def grpc_load(address: str, model: str, *, tokens: int, unary: bool, clients: int, count: int) -> Run:
    body = chat_request(model, tokens, unary=unary).SerializeToString()
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        chat = channel.unary_stream(CHAT)

        async def one() -> int:
            events = 0
            async for _ in chat(body):
                events += 1
            return events

        await one()
        return await closed_loop(one, clients, count)


async def rest_load(base: str, model: str, *, tokens: int, unary: bool, clients: int, count: int) -> Run:
    body = orjson.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": "How fast is this?"}],
            "max_tokens": tokens,
            "stream": not unary,
        }
    )
    headers = {"content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:

        async def one() -> int:
            async with session.post(f"{base}/v1/chat/completions", data=body, headers=headers) as reply:
                text = await reply.read()
                if reply.status != 200:
                    raise RuntimeError(f"HTTP {reply.status}: {text[:200]!r}")
                return text.count(b"data: {") if not unary else 1

        await one()
        return await closed_loop(one, clients, count)
