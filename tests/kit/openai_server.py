"""A fake OpenAI-speaking server over real HTTP that is honest about what such servers send, adopted by the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from infermesh.v1 import language_model_pb2 as lm
from services.llm.engine import EngineInfo, Event
from services.llm.engines.openai_http import OpenAiHttpEngine
from services.llm.settings import LlmSettings

# What llama-server (b1-0c1e570, of llama-cpp-python 0.3.36) says of itself, as far as it is read.
LLAMA_PROPS = {"default_generation_settings": {"n_ctx": 1024}, "total_slots": 2, "build_info": "b1-0c1e570"}


class Fake:
    """Sends `pieces` of bytes as they are; `None` among them hangs until the client has gone."""

    def __init__(self, **entry: Any) -> None:
        self.entry = {"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 4096, **entry}
        self.pieces: list[bytes | None] = []
        self.status = 200
        self.headers = {"Content-Type": "text/event-stream"}
        self.asked: list[dict[str, Any]] = []
        self.authorization: list[str | None] = []
        self.open = 0
        self.gone = asyncio.Event()

    async def models(self, request: web.Request) -> web.Response:
        self.authorization.append(request.headers.get("Authorization"))
        return web.json_response({"object": "list", "data": [self.entry]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        if self.status != 200:
            return web.Response(status=self.status, body=self.pieces[0], headers=self.headers)
        reply = web.StreamResponse(headers=self.headers)
        self.open += 1
        try:
            await reply.prepare(request)
            for piece in self.pieces:
                if piece is None:
                    await asyncio.sleep(60)
                else:
                    await reply.write(piece)
                    await asyncio.sleep(0.002)
        except (ConnectionError, asyncio.CancelledError):
            self.gone.set()
            raise
        finally:
            self.open -= 1
        return reply

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        words = (body.get("prompt") or " ".join(m["content"] for m in body["messages"])).split()
        return web.json_response({"tokens": list(range(len(words))), "count": len(words), "max_model_len": 4096})

    def says(self, *chunks: dict[str, Any] | str, done: bool = True) -> None:
        lines = [
            chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            for chunk in chunks
        ]
        self.pieces = [line.encode() for line in lines] + ([b"data: [DONE]\n\n"] if done else [])


@asynccontextmanager
async def served(fake: Fake) -> AsyncIterator[str]:
    """Its base URL."""
    app = web.Application()
    app.router.add_get("/v1/models", fake.models)
    app.router.add_get("/version", _fixed({"version": "0.32.1"}))
    app.router.add_get("/props", _fixed(LLAMA_PROPS))
    app.router.add_post("/v1/chat/completions", fake.answer)
    app.router.add_post("/v1/completions", fake.answer)
    app.router.add_post("/tokenize", fake.tokenize)
    app.router.add_post("/detokenize", _fixed({"prompt": "back"}))
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def adopted(fake: Fake, **settings: Any) -> AsyncIterator[tuple[OpenAiHttpEngine, EngineInfo]]:
    async with served(fake) as url:
        given = {"engine": "openai-http", "model": "m", "source": url, **settings}
        engine = OpenAiHttpEngine(LlmSettings(**given))
        try:
            yield engine, await engine.start(lambda line: None)
        finally:
            await engine.close()


def _fixed(body: dict[str, Any]) -> Any:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(body)

    return answer


def chat(text: str = "hi", **fields: Any) -> lm.ChatRequest:
    return lm.ChatRequest(model="m", messages=[lm.Message(role=lm.ROLE_USER, content=text)], **fields)


def chunk(text: str | None = None, finish: str | None = None, index: int = 0, **delta: Any) -> dict[str, Any]:
    body = {**({} if text is None else {"content": text}), **delta}
    return {"id": "x", "choices": [{"index": index, "delta": body, "finish_reason": finish}]}


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}},
}


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def text_of(events: list[Event]) -> str:
    return "".join(delta.content for event in events for delta in event.deltas)
