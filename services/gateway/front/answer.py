"""RetrieveService.Answer: embed -> rank -> rerank -> chat, each stage as a request of its own on its own tier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import grpc.aio

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import rerank_pb2 as rr
from infermesh.v1 import retrieve_pb2 as rt
from services.chassis.rpc import Context, abort, as_mesh_error
from services.gateway.entrance import Entrance
from services.gateway.front import passages
from services.gateway.front.passages import Known
from services.gateway.front.rooted import rooted
from services.gateway.front.rpc import RETRIEVE, Door, identity, parse
from services.gateway.upstream.calls import Call, DirectoryView, Forward, Method, Reply

STAGE_SHARE = 0.25  # of the time left, for each stage before the chat
STAGE_S = 30.0
_ENTRANCE = Entrance(f"{RETRIEVE}/Answer")
ROWS = 256  # vectors compared in one turn of the loop
# The caller's own faults, which end the call; any other failure of a stage before the chat skips it.
_CALLERS = frozenset(
    {
        *(Reason.INVALID_ARGUMENT, Reason.UNSUPPORTED, Reason.REQUEST_TOO_LARGE, Reason.CONTEXT_LENGTH_EXCEEDED),
        *(Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED, Reason.MODEL_NOT_FOUND, Reason.RATE_LIMITED),
        Reason.CANCELLED,
    }
)
_FIELDS = {"llm": "chat_model", "embedding": "embedding_model", "rerank": "rerank_model"}


class Answer:
    """The gRPC handler."""

    def __init__(self, door: Door, directory: DirectoryView) -> None:
        self._door = door
        self._directory = directory

    async def __call__(self, request: bytes, context: Context) -> None:
        try:
            with rooted(self._door.watcher, self._door.call("answer", _ENTRANCE, context)) as call:
                message = parse(rt.AnswerRequest, request)
                async with aclosing(answer(message, call, self._door.forward, self._directory)) as events:
                    async for reply, event in events:
                        if event.HasField("chat") and event.chat.HasField("started"):
                            await context.send_initial_metadata(identity(reply, call))
                        await context.write(event.SerializeToString())
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort(context, as_mesh_error(error))


async def answer(
    request: rt.AnswerRequest, call: Call, forward: Forward, directory: DirectoryView
) -> AsyncGenerator[tuple[Reply, rt.AnswerResponse]]:
    """The events of the answer. Close it: `aclosing`.

    Raises:
        MeshError: INVALID_ARGUMENT, MODEL_NOT_FOUND, or what ended the chat.
    """
    asked = passages.question(request)
    chat_model = _model(request, "llm", call, directory)
    if not chat_model:
        raise MeshError(Reason.MODEL_NOT_FOUND, "this mesh serves no language model", param="chat_model")
    retrieval = _Retrieval(request, call, forward, directory)
    chosen = await retrieval.chosen(asked)
    shown = passages.shown(asked.pinned, chosen)
    chat = lm.ChatRequest(model=chat_model, messages=passages.conversation(request, shown))
    for name in ("sampling", "hints", "delivery"):
        if request.HasField(name):
            getattr(chat, name).CopyFrom(getattr(request, name))
    chat.template_args_json = request.template_args_json
    chat.hints.document_id = chat.hints.document_id or passages.document(shown)
    first = rt.AnswerResponse(stages=retrieval.stages)
    for one in shown:
        pinned = one in asked.pinned
        first.cited.add(id=one.id, score=0.0 if pinned else one.score, document_id=one.document_id, pinned=pinned)
    with _named(Method.CHAT):
        async with forward.open(Method.CHAT, chat, retrieval.call) as reply:
            async for event in reply:
                first.chat.CopyFrom(event.message)
                yield reply, first
                first = rt.AnswerResponse()


@dataclass(slots=True)
class _Retrieval:
    """The stages before the chat, and what they did."""

    request: rt.AnswerRequest
    call: Call
    forward: Forward
    directory: DirectoryView
    stages: list[rt.Stage] = field(default_factory=list)

    async def chosen(self, asked: passages.Question) -> tuple[Known, ...]:
        """The candidates for the prompt, best first."""
        ranked: Sequence[Known] = asked.candidates
        if len(ranked) > min(asked.rerank_top, asked.top_k):
            embed, rerank = (_model(self.request, kind, self.call, self.directory) for kind in ("embedding", "rerank"))
            if len(ranked) > asked.rerank_top or not rerank:  # else the reranker sees them all anyway
                ranked = await self._stage("embed", embed, ranked, self._by_vectors)
            ranked = ranked[: asked.rerank_top]
            if len(ranked) > asked.top_k:
                ranked = await self._stage("rerank", rerank, ranked, self._by_reranker)
        return tuple(ranked[: asked.top_k])

    async def _stage(self, name: str, model: str, ranked: Sequence[Known], run: Any) -> Sequence[Known]:
        """The passages in the stage's order, or as they were if it was skipped."""
        stage = rt.Stage(name=name, model=model)
        self.stages.append(stage)
        if not model:
            stage.skipped = "no model of this kind is served"
            return ranked
        clock = asyncio.get_running_loop().time
        began = clock()
        left = STAGE_S if self.call.deadline is None else STAGE_SHARE * (self.call.deadline - began)
        own = replace(self.call, request_id=f"{self.call.request_id[:120]}-{name}", deadline=began + min(STAGE_S, left))
        try:
            return await run(stage, ranked, own)
        except MeshError as error:
            if error.reason in _CALLERS:
                raise
            stage.skipped = f"{error.reason.value}: {error.message}"
            return ranked
        finally:
            stage.seconds = clock() - began

    async def _by_vectors(self, stage: rt.Stage, ranked: Sequence[Known], call: Call) -> Sequence[Known]:
        request = self.request
        missing = [one for one in ranked if not one.vector]
        asks = [em.EmbedRequest(model=stage.model, texts=[request.question], task=request.question_task)]
        if missing:
            texts = [one.text for one in missing]
            asks.append(em.EmbedRequest(model=stage.model, texts=texts, task=request.passage_task))
        for ask in asks:
            if request.HasField("hints"):
                ask.hints.priority = request.hints.priority
        replies = await _together([self._unary(Method.EMBED, ask, call, stage) for ask in asks])
        vectors = {one.id: one.vector for one in ranked}
        if missing:
            vectors |= {one.id: found.packed for one, found in zip(missing, replies[1].vectors, strict=True)}
        scored: list[Known] = []
        for start in range(0, len(ranked), ROWS):
            part = ranked[start : start + ROWS]
            found = passages.similarities(replies[0].vectors[0].packed, [vectors[one.id] for one in part])
            scored += [replace(one, score=score) for one, score in zip(part, found, strict=True)]
            await asyncio.sleep(0)
        return passages.best(scored, len(scored))

    async def _by_reranker(self, stage: rt.Stage, ranked: Sequence[Known], call: Call) -> Sequence[Known]:
        documents = [one.text for one in ranked]
        ask = rr.RerankRequest(model=stage.model, query=self.request.question, documents=documents)
        if self.request.HasField("hints"):
            ask.hints.priority = self.request.hints.priority
        reply = await self._unary(Method.RERANK, ask, call, stage)
        scored = [replace(ranked[found.index], score=found.score) for found in reply.results]
        return passages.best(scored, len(scored))

    async def _unary(self, method: Method, request: Any, call: Call, stage: rt.Stage) -> Any:
        with _named(method):
            async with self.forward.open(method, request, call) as reply:
                async for event in reply:
                    stage.instance_id = reply.identity.shown[0]
                    stage.model = reply.identity.model_id or stage.model
                    stage.tokens += event.message.usage.prompt_tokens
                    return event.message
        raise MeshError(Reason.INTERNAL, "the instance gave no answer")


class _named:
    """Faults of a stage's request in the words of the caller's own."""

    _NAMES = {  # noqa: RUF012
        Method.EMBED: {"model": "embedding_model", "task": "question_task"},
        Method.RERANK: {"model": "rerank_model", "documents": "candidates", "query": "question"},
        Method.CHAT: {"model": "chat_model", "messages": "candidates"},
    }

    def __init__(self, method: Method) -> None:
        self._names = self._NAMES[method]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        if isinstance(error, MeshError) and error.param:
            error.param = self._names.get(error.param, error.param)


def _model(request: rt.AnswerRequest, kind: str, call: Call, directory: DirectoryView) -> str:
    """The model for a stage: the one named, else the only one that the caller may use; empty = none is served.

    Raises:
        MeshError: INVALID_ARGUMENT when several are served and none is named.
    """
    name = _FIELDS[kind]
    named: str = getattr(request, name)
    if named:
        return named
    allowed = call.caller.models
    views = [view for view in directory.models() if view.kind == kind and (not allowed or view.id in allowed)]
    served = [view.id for view in views if not view.variants] or [view.id for view in views]  # an alias serves nothing
    if len(served) > 1:
        raise invalid(name, f"several are served, name one of {', '.join(served)}")
    return served[0] if served else ""


async def _together(jobs: Sequence[Any]) -> list[Any]:
    """All results; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
