"""Callers of the REST door: whole answers, and raw bytes for what no library would send."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.fault.fleet import Fleet
from tests.fault.load import MODEL, TIMEOUT_S


@dataclass(slots=True)
class Answer:
    """`status` 0: the connection broke. `error` is empty for a whole and right answer."""

    began: float
    ended: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    error: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def attempts(self) -> int:
        return int(self.headers.get("x-infermesh-attempts", "0"))

    @property
    def code(self) -> str:
        """Of OpenAI's error object."""
        return str((self.body or {}).get("error", {}).get("code", "")) if isinstance(self.body, dict) else ""


def chat(tokens: int = 3, text: str = "hello there", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, **more}


async def post(
    session: aiohttp.ClientSession, address: str, body: Any, path: str = "/v1/chat/completions", **how: Any
) -> Answer:
    """One request that is not streamed. `how` as aiohttp takes it; bytes are sent as they are."""
    answer = Answer(time.monotonic())
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **how.pop("headers", {})}
    timeout = aiohttp.ClientTimeout(how.pop("timeout_s", TIMEOUT_S))
    try:
        async with session.post(f"http://{address}{path}", data=data, headers=headers, timeout=timeout, **how) as reply:
            answer.status = reply.status
            answer.headers = {name.lower(): value for name, value in reply.headers.items()}
            raw = await reply.read()
            try:
                answer.body = json.loads(raw)
            except ValueError:
                answer.error = f"HTTP {reply.status} with no JSON: {raw[:80]!r}"
            if reply.status != 200:
                answer.error = f"HTTP {reply.status} {answer.code}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.monotonic()
    return answer


def session() -> aiohttp.ClientSession:
    """Without a bound on connections, and without the environment's proxy."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False)


async def rest_burst(mesh: Fleet, count: int, tokens: int = 3) -> list[Answer]:
    """So many at once, each with its own prompt."""
    async with session() as one:
        asked = (post(one, mesh.http(), chat(tokens, f"question {number}")) for number in range(count))
        answers = await asyncio.gather(*asked)
    wanted = "".join(f" w{number}" for number in range(tokens))
    for answer in answers:
        if not answer.error and answer.body["choices"][0]["message"]["content"] != wanted:
            answer.error = f"wrong text: {answer.body}"
    return answers


async def raw(address: str, data: bytes, *, timeout_s: float = 15.0) -> bytes:
    """Sends bytes, and reads until the other side hangs up."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        return await asyncio.wait_for(reader.read(), timeout_s)
    finally:
        writer.transport.abort()
