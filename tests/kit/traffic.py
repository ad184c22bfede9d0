"""A steady load of all kinds on a gateway, over gRPC and REST, and what became of each request.

async with traffic(grpc, http, chat="demo") as load:
    ... break something ...
assert not load.failures
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from infermesh.client import AsyncClient, MeshError, Reason

TIMEOUT_S = 15.0  # a request that takes longer hangs
PAUSE_S = 0.05
PROMPT = "hello there"
TEXTS = ["the cat sat on the mat", "stocks fell on Monday"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`error` is empty for a whole answer; `begun`: whether the caller had a part of it."""

    kind: str
    seconds: float
    begun: bool
    error: str = ""


class Failed(Exception):
    def __init__(self, reason: str, *, begun: bool = False) -> None:
        super().__init__(reason)
        self.begun = begun


@dataclass
class Load:
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def lost_streams(self) -> list[Outcome]:
        """Streams that had begun and ended with the one error that says so."""
        return [one for one in self.outcomes if one.begun and one.error.startswith(Reason.STREAM_LOST.value)]

    @property
    def failures(self) -> list[Outcome]:
        """Everything else that went wrong."""
        lost = set(map(id, self.lost_streams))
        return [one for one in self.outcomes if one.error and id(one) not in lost]

    def __str__(self) -> str:
        """For the log of a test run."""
        kinds = Counter(one.kind for one in self.outcomes if not one.error)
        slowest = max((one.seconds for one in self.outcomes), default=0.0)
        served = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        failed = f"{len(self.lost_streams)} streams lost, {len(self.failures)} failures"
        return f"{sum(kinds.values())} whole answers ({served}), {failed}, slowest {slowest:.2f} s"


@dataclass(frozen=True, slots=True)
class _Asked:
    chat: str
    encoder: str
    reranker: str
    tokens: int
    answer: str


@asynccontextmanager
async def traffic(
    grpc: str,
    http: str,
    *,
    chat: str,
    encoder: str,
    reranker: str = "",
    tokens: int = 8,
    answer: str = "",
    chats: int = 1,
    key: str = "",
) -> AsyncIterator[Load]:
    """Every kind over both doors, `chats` callers each for chats and one for the rest, until the end of the block.

    `reranker`: as `encoder` unless told. `answer`: the whole text that every chat must give, greedily; the scripted
    engine's unless told, which says what it counts, so that a lost or doubled token shows.
    """
    answer = answer or "".join(f" w{number}" for number in range(tokens))
    asked = _Asked(chat, encoder, reranker or encoder, tokens, answer)
    load, over = Load(), asyncio.Event()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        AsyncClient(grpc, api_key=key, timeout=TIMEOUT_S) as client,
        aiohttp.ClientSession(f"http://{http}", connector=connector, headers=headers, trust_env=False) as session,
    ):
        chatting, rest = _grpc(client, asked), _rest(session, asked)
        calls = {
            **{f"grpc {name}": call for name, call in chatting.items()},
            **{f"rest {name}": call for name, call in rest.items()},
        }
        callers = [
            asyncio.create_task(_caller(kind, call, load, over))
            for kind, call in calls.items()
            for _ in range(chats if "chat" in kind else 1)
        ]
        try:
            yield load
        finally:
            over.set()
            await asyncio.gather(*callers)


async def _caller(kind: str, call: Callable[[], Awaitable[None]], load: Load, over: asyncio.Event) -> None:
    while not over.is_set():
        begun_at, begun, error = time.monotonic(), False, ""
        try:
            await call()
        except Failed as failed:
            begun, error = failed.begun, str(failed)
        except (MeshError, aiohttp.ClientError, TimeoutError, ValueError, KeyError) as unexpected:
            error = f"{type(unexpected).__name__}: {unexpected}"
        load.outcomes.append(Outcome(kind, time.monotonic() - begun_at, begun, error))
        await asyncio.sleep(PAUSE_S)


def _grpc(client: AsyncClient, asked: _Asked) -> dict[str, Callable[[], Awaitable[None]]]:
    async def stream() -> None:
        text, begun = "", False
        try:
            async for chunk in client.chat_stream(PROMPT, model=asked.chat, max_tokens=asked.tokens, temperature=0):
                begun = True
                text += chunk.text
        except MeshError as error:
            raise Failed(f"{error.reason.value}: {error}", begun=begun) from None
        _whole(text, asked)

    async def embed() -> None:
        if len(await client.embed(TEXTS, model=asked.encoder)) != 2:
            raise Failed("not two vectors")

    async def rerank() -> None:
        if len(await client.rerank("a pet", TEXTS, model=asked.reranker)) != 2:
            raise Failed("not two hits")

    return {"chat stream": stream, "embed": embed, "rerank": rerank}


def _rest(session: aiohttp.ClientSession, asked: _Asked) -> dict[str, Callable[[], Awaitable[None]]]:
    async def post(path: str, **body: Any) -> Any:
        async with session.post(path, json=body, timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as reply:
            told = json.loads(await reply.read())
            if reply.status != 200:
                raise Failed(f"{told['error']['code']}: HTTP {reply.status} {told['error']['message']}")
            return told

    body = {"model": asked.chat, "messages": [{"role": "user", "content": PROMPT}]}
    body |= {"max_tokens": asked.tokens, "temperature": 0}

    async def plain() -> None:
        told = await post("/v1/chat/completions", **body)
        _whole(told["choices"][0]["message"]["content"], asked)

    async def stream() -> None:
        text, ended = "", False
        timeout = aiohttp.ClientTimeout(TIMEOUT_S)
        async with session.post("/v1/chat/completions", json={**body, "stream": True}, timeout=timeout) as reply:
            if reply.status != 200:
                error = json.loads(await reply.read())["error"]
                raise Failed(f"{error['code']}: HTTP {reply.status} {error['message']}")
            async for line in reply.content:
                if not line.startswith(b"data: "):
                    continue
                if ended := line.strip() == b"data: [DONE]":
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    raise Failed(f"{event['error']['code']}: {event['error']['message']}", begun=True)
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if not ended:
            raise Failed("no [DONE]", begun=True)
        _whole(text, asked)

    async def embed() -> None:
        if len((await post("/v1/embeddings", model=asked.encoder, input=TEXTS))["data"]) != 2:
            raise Failed("not two vectors")

    async def rerank() -> None:
        if len((await post("/v1/rerank", model=asked.reranker, query="a pet", documents=TEXTS))["results"]) != 2:
            raise Failed("not two hits")

    return {"chat stream": stream, "chat plain": plain, "embed": embed, "rerank": rerank}


def _whole(text: str, asked: _Asked) -> None:
    if text != asked.answer:
        raise Failed(f"{text!r} is not {asked.answer!r}")
