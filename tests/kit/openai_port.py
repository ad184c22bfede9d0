"""A scripted engine with two doors: the mesh's own (gRPC, registered) and OpenAI's HTTP, so that any router can stand
before the same engine.

    python -m tests.kit.openai_port --http-file FILE.json LLM_OPTIONS…      the options of `infermesh llm`

Both doors share one batch, one prefix cache and one clock. HTTP has what stock routers ask for: `/v1/completions`,
`/v1/chat/completions` (whole or as server-sent events), `/v1/models`, `/health`, `/metrics` under vLLM's names.
Fields that a scripted answer cannot honour are refused by name.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import orjson
import typer
import typer.main
from aiohttp import web

from infermesh.cli import llm as verb
from infermesh.errors import MeshError
from infermesh.v1 import language_model_pb2 as lm
from registry.endpoint import Endpoint
from services.chassis.held_prefixes import HeldPrefixes
from services.chassis.instance import InstanceContext, Program, run_instance
from services.chassis.ready import tell_ready
from services.llm.app import program_of
from services.llm.engine import Event
from services.llm.engines.scripted import ScriptedEngine
from services.llm.settings import LlmSettings
from services.llm.window import OutOfWindow

MAX_BODY = 64 << 20  # bytes
# The text is always the same and holds neither special tokens nor reasoning.
WITHOUT_EFFECT = frozenset({"temperature", "top_p", "seed", "user", "skip_special_tokens"}) | frozenset(
    {"include_reasoning", "separate_reasoning", "stream_reasoning"}
)
SERVED = frozenset({"model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options"})
ROLES = {"system": lm.ROLE_SYSTEM, "user": lm.ROLE_USER, "assistant": lm.ROLE_ASSISTANT, "tool": lm.ROLE_TOOL}
FINISHES = {lm.FINISH_STOP: "stop", lm.FINISH_LENGTH: "length"}
Shape = Literal["completion", "chat"]


class OpenAiPort:
    """The HTTP door. Closing the connection aborts the request in the engine."""

    def __init__(self, engine: ScriptedEngine, model: str, max_context: int) -> None:
        self._engine = engine
        self._model = model
        self._max_context = max_context
        self._asked = self._hit = 0  # prompt tokens, and those of them found in the prefix cache
        self._number = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_post("/v1/completions", self._door("completion"))
        app.router.add_post("/v1/chat/completions", self._door("chat"))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        entry = {"id": self._model, "object": "model", "created": 0, "owned_by": "vllm"}
        return web.json_response({"object": "list", "data": [entry | {"max_model_len": self._max_context}]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        load = self._engine.load()
        values = {
            "num_requests_running": load.running,
            "num_requests_waiting": load.waiting,
            "kv_cache_usage_perc": load.kv_used_ratio,
            "prefix_cache_queries_total": self._asked,
            "prefix_cache_hits_total": self._hit,
        }
        lines = [f'vllm:{name}{{model_name="{self._model}"}} {value}\n' for name, value in values.items()]
        return web.Response(text="".join(lines), content_type="text/plain")

    def _door(self, shape: Shape) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                body = orjson.loads(await request.read())
                asked = _request(body, shape, self._model)
            except (ValueError, TypeError, KeyError) as error:
                return _error(400, str(error))
            self._number += 1
            envelope = {"id": f"{shape}-{self._number}", "created": int(time.time()), "model": self._model}
            answer = self._engine.chat(asked) if shape == "chat" else self._engine.complete(asked)  # type: ignore[arg-type]
            try:
                async with aclosing(answer) as events:  # type: ignore[type-var]
                    if body.get("stream"):
                        usage = bool((body.get("stream_options") or {}).get("include_usage"))
                        return await self._streamed(request, events, envelope, shape, usage)
                    return await self._whole(events, envelope, shape)
            except (MeshError, OutOfWindow) as error:
                return _error(400, str(error))

        return handle

    async def _streamed(
        self, request: web.Request, events: AsyncIterator[Event], envelope: dict[str, Any], shape: Shape, usage: bool
    ) -> web.StreamResponse:
        """The head goes out with the first token: until then a refusal still has a status of its own."""
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        envelope = envelope | {"object": "chat.completion.chunk" if shape == "chat" else "text_completion"}
        async for event in events:
            if event.prompt is not None:
                await reply.prepare(request)
            chunk = envelope | {"choices": [_choice(delta, shape, "delta") for delta in event.deltas]}
            data = b"data: " + orjson.dumps(chunk) + b"\n\n"
            if event.usage is not None:
                if usage:
                    data += b"data: " + orjson.dumps(envelope | {"choices": [], "usage": self._used(event)}) + b"\n\n"
                else:
                    self._used(event)
                data += b"data: [DONE]\n\n"
            await reply.write(data)
        await reply.write_eof()
        return reply

    async def _whole(self, events: AsyncIterator[Event], envelope: dict[str, Any], shape: Shape) -> web.Response:
        all_of_it, used = lm.Delta(), {}
        async for event in events:
            for delta in event.deltas:
                all_of_it.content += delta.content
                all_of_it.finish = delta.finish
            if event.usage is not None:
                used = self._used(event)
        choice = _choice(all_of_it, shape, "message")
        named = envelope | {"object": "chat.completion" if shape == "chat" else "text_completion"}
        return web.json_response(named | {"choices": [choice], "usage": used})

    def _used(self, event: Event) -> dict[str, Any]:
        assert event.usage is not None
        prompt, completion, cached = (
            event.usage.prompt_tokens,
            event.usage.completion_tokens,
            event.usage.cached_tokens,
        )
        self._asked += prompt
        self._hit += cached
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _request(body: Any, shape: Shape, model: str) -> lm.ChatRequest | lm.CompleteRequest:
    if not isinstance(body, dict):
        raise ValueError("the body must be an object")
    wanted = {key for key, value in body.items() if value not in (None, False)}  # routers spell out what is off
    if unknown := sorted(wanted - SERVED - WITHOUT_EFFECT):
        raise ValueError(f"{', '.join(unknown)}: not served by a scripted engine")
    if body.get("model") != model:
        raise ValueError(f"model {body.get('model')!r} is not {model!r}")
    sampling = lm.Sampling()
    if (most := body.get("max_completion_tokens", body.get("max_tokens"))) is not None:
        sampling.max_tokens = most
    if shape == "completion":
        return lm.CompleteRequest(model=model, text=body["prompt"], sampling=sampling)
    messages = [lm.Message(role=ROLES[message["role"]], content=message["content"]) for message in body["messages"]]
    return lm.ChatRequest(model=model, messages=messages, sampling=sampling)


def _choice(delta: lm.Delta, shape: Shape, part: str) -> dict[str, Any]:
    said = {"text": delta.content} if shape == "completion" else {part: {"role": "assistant", "content": delta.content}}
    return {"index": delta.choice, **said, "logprobs": None, "finish_reason": FINISHES.get(delta.finish)}


def _error(status: int, message: str) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "code": status}
    return web.json_response({"error": error, "object": "error"}, status=status)


async def run(settings: LlmSettings, host: str, http_file: Path) -> int:
    """Runs the instance to its end; `http_file` is told the HTTP address as soon as it listens."""
    runners: list[web.AppRunner] = []

    def build(context: InstanceContext) -> Program:
        held = HeldPrefixes()
        engine = ScriptedEngine(settings, held, context.arrivals.room.computed)
        program = program_of(engine, held, settings, context)

        async def start(draft: Endpoint, progress: Callable[[str], None]) -> Endpoint:
            endpoint = await program.start(draft, progress)
            port = OpenAiPort(engine, settings.model, endpoint.capacity.context_max)
            runner = web.AppRunner(port.app(), handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
            runners.append(runner)
            await runner.setup()
            await web.TCPSite(runner, host, 0).start()
            tell_ready(http_file, {"http": f"{host}:{runner.addresses[0][1]}"})
            return endpoint

        async def close() -> None:
            for runner in runners:
                await runner.cleanup()
            await program.close()

        return dataclasses.replace(program, start=start, close=close)

    return await run_instance(settings, build)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--http-file", type=Path, required=True, help="written, as JSON, once HTTP is served")
    own, options = parser.parse_known_args()
    app = typer.Typer(add_completion=False)
    app.command()(verb.command)
    parsed = typer.main.get_command(app).make_context("openai_port", ["--engine", "scripted", *options])
    settings = verb.settings_of({name: value for name, value in parsed.params.items() if value is not None})
    return asyncio.run(run(settings, "127.0.0.1", own.http_file))


if __name__ == "__main__":
    sys.exit(main())
