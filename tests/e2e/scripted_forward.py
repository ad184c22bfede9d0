"""A forwarder without a fleet: the real request checks, the real events, no instance behind them.

It is what the REST front is tested against in one process; the SDK tests run against a whole mesh.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import rerank_pb2 as rr
from services.chassis import checks
from services.gateway.routing.decision import Record
from services.gateway.routing.facts import Facts
from services.gateway.routing.groups import GroupView
from services.gateway.upstream.calls import Call, Event, Identity, InstanceView, Method, ModelView

KINDS = {"chat": "llm", "embed": "embedding", "rank": "rerank", "org/rank": "rerank"}
CHECKS = {
    Method.CHAT: checks.check_chat,
    Method.COMPLETE: checks.check_complete,
    Method.EMBED: checks.check_embed,
    Method.RERANK: checks.check_rerank,
}


@dataclass
class ScriptedForward:
    """`calls` holds what was opened; `running` what is open now; `step_s` the time between tokens."""

    step_s: float = 0.0
    first_s: float = 0.0
    tokens: int = 5
    dimensions: int = 4
    fail_first: MeshError | None = None
    fail_after: int | None = None  # tokens, then STREAM_LOST
    tool_call: bool = False
    reasoning: bool = False
    calls: list[tuple[Method, Any, Call]] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0

    @asynccontextmanager
    async def open(self, method: Method, request: Any, call: Call) -> AsyncIterator[Any]:
        if method in CHECKS:
            CHECKS[method](request)
        if KINDS.get(request.model) != method.kind:
            raise MeshError(Reason.MODEL_NOT_FOUND, f"no such model: {request.model!r}", param="model")
        if call.caller.models and request.model not in call.caller.models:
            raise MeshError(Reason.PERMISSION_DENIED, "this key may not use the model", param="model")
        self.calls.append((method, request, call))
        if self.fail_first is not None:
            raise self.fail_first
        self.running += 1
        try:
            await asyncio.sleep(self.first_s)
            yield _Reply(Identity("llm-1", f"{request.model}-served"), self._events(method, request))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _events(self, method: Method, request: Any) -> AsyncIterator[Event]:
        if method in (Method.CHAT, Method.COMPLETE):
            async for message in self._generate(method, request):
                yield Event(b"", method.response.FromString(message.SerializeToString()))
        else:
            yield Event(b"", _unary(method, request, self.dimensions))

    async def _generate(self, method: Method, request: Any) -> AsyncIterator[Any]:
        sampling = request.sampling
        tokens = min(self.tokens, sampling.max_tokens or self.tokens)
        n = sampling.n or 1
        echo = request.text if method is Method.COMPLETE and request.echo else ""
        for number in range(tokens):
            if self.fail_after is not None and number == self.fail_after:
                raise MeshError(Reason.STREAM_LOST, f"lost after {number} tokens")
            if number:
                await asyncio.sleep(self.step_s)
            event = method.response()
            if number == 0:
                event.started.id = f"id-{len(self.calls)}"
                event.started.created = 1_700_000_000
                event.started.model = f"{request.model}-served"
                event.started.prompt_tokens = 7
                if sampling.HasField("prompt_logprobs"):
                    for word in (" b", " c"):
                        event.started.prompt_logprobs.add().candidates.add(token=word, logprob=-0.5, rank=1)
            for choice in range(n):
                self._delta(event.deltas.add(), choice, number, tokens, sampling, echo if number == 0 else "")
            yield event
        yield method.response(
            usage=inf.Usage(prompt_tokens=7, completion_tokens=tokens * n, cached_tokens=3, reasoning_tokens=0)
        )

    def _delta(self, delta: Any, choice: int, number: int, tokens: int, sampling: Any, echo: str) -> None:
        delta.choice = choice
        delta.token_ids.append(100 + number)
        last = number == tokens - 1
        if self.reasoning and number == 0:
            delta.reasoning = "hm"
        elif self.tool_call:
            call = delta.tool_calls.add(index=0, arguments_json='{"a":' if number == 0 else "1" if not last else "}")
            if number == 0:
                call.id, call.name = "call-1", "add"
        else:
            delta.content = f"{echo} w{number}"
        if sampling.HasField("logprobs"):
            entry = delta.logprobs.add(token=f" w{number}", token_bytes=f" w{number}".encode(), logprob=-0.25)
            for rank in range(sampling.logprobs):
                entry.top.add(token=f" t{rank}", token_bytes=b" t", logprob=float("-inf") if rank else -0.25, rank=rank)
        if last:
            delta.finish = lm.FINISH_TOOL_CALLS if self.tool_call else lm.FINISH_LENGTH


@dataclass
class _Reply:
    identity: Identity
    events: AsyncIterator[Event]

    def __aiter__(self) -> AsyncIterator[Event]:
        return self.events


def _unary(method: Method, request: Any, dimensions: int) -> Any:
    if method is Method.EMBED:
        count = len(request.texts) or len(request.token_ids)
        vectors = [em_vector(index, request.dimensions or dimensions) for index in range(count)]
        return em.EmbedResponse(vectors=vectors, usage=inf.Usage(prompt_tokens=3 * count), model="embed-served")
    if method is Method.RERANK:
        order = sorted(range(len(request.documents)), key=lambda at: -len(request.documents[at]))
        ranked = [rr.Ranked(index=at, score=len(request.documents[at]) / 100) for at in order]
        return rr.RerankResponse(results=ranked[: request.top_n or None], usage=inf.Usage(prompt_tokens=9), model="r")
    if method is Method.TOKENIZE:
        if request.WhichOneof("input") == "text" and not request.text:
            raise invalid("text", "must not be empty")
        return lm.TokenizeResponse(token_ids=[5, 6], max_context=2048, model=request.model, tokens=["a", "b"])
    return lm.DetokenizeResponse(text=" ".join(map(str, request.token_ids)), model=request.model)


def em_vector(index: int, dimensions: int) -> inf.Vector:
    return inf.Vector(packed=struct.pack(f"<{dimensions}f", *(index + at / 7 for at in range(dimensions))))


class ScriptedDirectory:
    stale = False
    healthy = 1
    aliases: dict[str, tuple[tuple[str, float], ...]] = {}  # noqa: RUF012

    def models(self) -> list[ModelView]:
        return [
            ModelView("chat", "llm", aliases=("gpt",), context_max=2048, created=1_700_000_000),
            ModelView("embed", "embedding", created=1_700_000_000),
            ModelView("org/rank", "rerank", created=1_700_000_000),
        ]

    def instances(self) -> list[InstanceView]:
        return [InstanceView("llm-1", "llm", "chat", "127.0.0.1:1", "healthy")]

    def groups(self) -> list[GroupView]:
        return []

    async def changed(self) -> None:
        await asyncio.Event().wait()

    def explain(self, facts: Facts) -> Record:
        return Record(facts.kind, facts.model, reason="only_candidate", chosen="llm-1")


@dataclass
class ScriptedWatcher:
    refusals: list[tuple[str, MeshError]] = field(default_factory=list)

    def refused(self, method: str, error: MeshError, call: Call, took_s: float = 0.0) -> None:
        self.refusals.append((method, error))

    def root(self, call: Call) -> None:
        return None

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        return b"infermesh_up 1\n", "text/plain; version=0.0.4"
