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
import psutil

from infermesh.transport import channel_options
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm

CHAT = "/infermesh.v1.LanguageModelService/Chat"
EMBED = "/infermesh.v1.EmbeddingService/Embed"
QUESTION = "How fast is this?"
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


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client asks for: an embedding of one text (`tokens` 0), or a chat of so many tokens, whole or streamed."""

    model: str
    tokens: int
    streamed: bool = False

    def grpc(self) -> bytes:
        if not self.tokens:
            return em.EmbedRequest(model=self.model, texts=[QUESTION]).SerializeToString()
        request = lm.ChatRequest(model=self.model, messages=[lm.Message(role=lm.ROLE_USER, content=QUESTION)])
        request.sampling.max_tokens = self.tokens
        if not self.streamed:
            request.delivery.min_interval_ms = 250
        return request.SerializeToString()

    def rest(self) -> tuple[str, bytes]:
        if not self.tokens:
            return "embeddings", orjson.dumps({"model": self.model, "input": QUESTION, "encoding_format": "base64"})
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": self.model, "messages": messages, "max_tokens": self.tokens, "stream": self.streamed}
        return "chat/completions", orjson.dumps(body)


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


async def grpc_load(address: str, ask: Ask, *, clients: int, count: int) -> Run:
    body = ask.grpc()
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        chat, embed = channel.unary_stream(CHAT), channel.unary_unary(EMBED)

        async def one() -> int:
            if not ask.tokens:
                await embed(body)
                return 1
            events = 0
            async for _ in chat(body):
                events += 1
            return events

        await one()
        return await closed_loop(one, clients, count)


async def rest_load(base: str, ask: Ask, *, clients: int, count: int) -> Run:
    path, body = ask.rest()
    headers = {"content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:

        async def one() -> int:
            async with session.post(f"{base}/v1/{path}", data=body, headers=headers) as reply:
                text = await reply.read()
                if reply.status != 200:
                    raise RuntimeError(f"HTTP {reply.status}: {text[:200]!r}")
                return text.count(b"data: {") if ask.streamed else 1

        await one()
        return await closed_loop(one, clients, count)


async def watch_idle(idle: list[float]) -> None:
    """Appends the machine's idle share once a second, until cancelled; what is niced gives way and counts as idle."""
    psutil.cpu_times_percent()
    while True:
        await asyncio.sleep(1.0)
        times = psutil.cpu_times_percent()
        idle.append((times.idle + times.nice) / 100)
