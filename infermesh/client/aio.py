"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Unpack, cast

import grpc
import grpc.aio

from infermesh.client import requests
from infermesh.client.aio_calls import AsyncCalls
from infermesh.client.results import Answer, Chunk, Completion, Embeddings, Rerank, Served, rerank_result
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import mesh_pb2
from infermesh.v1.embedding_pb2_grpc import EmbeddingServiceStub
from infermesh.v1.language_model_pb2_grpc import LanguageModelServiceStub
from infermesh.v1.mesh_pb2_grpc import MeshServiceStub
from infermesh.v1.rerank_pb2_grpc import RerankServiceStub
from infermesh.v1.retrieve_pb2_grpc import RetrieveServiceStub

IN_FLIGHT = 8  # batches of an embed_stream that wait for their vectors


class AsyncClient(AsyncCalls):
    """Speaks to the gateways at `addresses` ("host:port,host:port"): to one, until it dies, then to the next.
    "grpcs://host:port" is for TLS; `ca_file` names the authority where it is none of those that grpc knows, `tls_name`
    whom the certificate is for where that is not the host.

    `timeout` is seconds for a whole call and can be given a call; None waits for ever. Every method raises `MeshError`.
    """

    # ---- language models

    async def chat(
        self,
        messages: requests.Messages,
        *,
        model: str,
        tools: Iterable[Mapping[str, Any]] = (),
        tool_choice: str = "",
        template_args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **options: Unpack[requests.Options],
    ) -> Completion:
        """Answers a conversation, or one question."""
        request = requests.chat_request(
            messages,
            model,
            {"min_interval_ms": 250, **options},
            tools=tools,
            tool_choice=tool_choice,
            template_args=template_args,
        )
        return await self._collect(_chat, request, timeout)

    def chat_stream(
        self,
        messages: requests.Messages,
        *,
        model: str,
        tools: Iterable[Mapping[str, Any]] = (),
        tool_choice: str = "",
        template_args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **options: Unpack[requests.Options],
    ) -> AsyncIterator[Chunk]:
        """The same, as it is made. Leaving the loop (and closing the iterator) cancels the request."""
        request = requests.chat_request(
            messages, model, options, tools=tools, tool_choice=tool_choice, template_args=template_args
        )
        return self._stream(_chat, request, timeout)

    async def complete(
        self,
        prompt: requests.TextOrIds,
        *,
        model: str,
        echo: bool = False,
        timeout: float | None = None,
        **options: Unpack[requests.Options],
    ) -> Completion:
        """Continues a text or a list of token ids."""
        request = requests.complete_request(prompt, model, {"min_interval_ms": 250, **options}, echo=echo)
        return await self._collect(_complete, request, timeout)

    def complete_stream(
        self,
        prompt: requests.TextOrIds,
        *,
        model: str,
        echo: bool = False,
        timeout: float | None = None,
        **options: Unpack[requests.Options],
    ) -> AsyncIterator[Chunk]:
        return self._stream(_complete, requests.complete_request(prompt, model, options, echo=echo), timeout)

    async def tokenize(
        self,
        text: requests.Messages,
        *,
        model: str,
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> lm.TokenizeResponse:
        """A text, or a conversation as `chat` would see it, in token ids."""
        request = requests.tokenize_request(text, model, add_special_tokens=add_special_tokens)
        reply, _ = await self._unary(lambda channel: LanguageModelServiceStub(channel).Tokenize, request, timeout)
        return reply

    async def detokenize(self, token_ids: Sequence[int], *, model: str, timeout: float | None = None) -> str:
        request = lm.DetokenizeRequest(model=model, token_ids=token_ids)
        reply, _ = await self._unary(lambda channel: LanguageModelServiceStub(channel).Detokenize, request, timeout)
        return str(reply.text)

    # ---- embedding and rerank

    async def embed(
        self, inputs: requests.Inputs, *, model: str, timeout: float | None = None, **options: Any
    ) -> Embeddings:
        """Vectors of texts (or token ids). Options: dimensions, normalize, truncation (none, end, start), task, prefix,
        max_tokens.
        """
        request = requests.embed_request(inputs, model, **options)
        reply, who = await self._unary(lambda channel: EmbeddingServiceStub(channel).Embed, request, timeout)
        return Embeddings(reply, who)

    async def embed_stream(
        self,
        batches: Iterable[requests.Inputs] | AsyncIterable[requests.Inputs],
        *,
        model: str,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncIterator[Embeddings]:
        """Bulk work: the vectors of each batch, in order. At most 8 batches are on the way; the next one is read from
        `batches` when there is room.
        """
        room = asyncio.Semaphore(IN_FLIGHT)
        fault: list[Exception] = []  # of the caller's own iterator; grpc would only log it

        async def frames() -> AsyncIterator[em.EmbedStreamRequest]:
            tag = 0
            try:
                async for batch in _each(batches):
                    await room.acquire()
                    tag += 1
                    yield em.EmbedStreamRequest(batch=requests.embed_request(batch, model, **options), tag=tag)
            except Exception as error:
                fault.append(error)

        index = await self._reach()
        call = EmbeddingServiceStub(self._channel(index)).EmbedStream(
            frames(), timeout=self._seconds(timeout), metadata=self._metadata
        )
        batches_done = 0
        try:
            async for reply in call:
                batches_done += 1
                room.release()
                yield Embeddings(reply.batch, Served(model=reply.batch.model))
            if fault:
                raise fault[0]
        except grpc.aio.AioRpcError as error:
            raise self._error(error, got=f"{batches_done} batches" if batches_done else "") from None
        finally:
            call.cancel()

    async def rerank(
        self, query: str, documents: Sequence[str], *, model: str, timeout: float | None = None, **options: Any
    ) -> Rerank:
        """Documents by relevance. Options: top_n, return_documents, raw_scores, truncation."""
        request = requests.rerank_request(query, documents, model, **options)
        reply, who = await self._unary(lambda channel: RerankServiceStub(channel).Rerank, request, timeout)
        return rerank_result(reply, who)

    async def answer(
        self, question: str, passages: Iterable[requests.Passage], *, timeout: float | None = None, **options: Any
    ) -> Answer:
        """Answers from passages, of which the mesh picks the best by vectors and reranker.

        Options: those of `chat`; shown (how many passages the model gets), pinned (passages that it gets in any case,
        first), rerank_top, instructions, question_task, passage_task; chat_model, embedding_model and rerank_model,
        each of which may be left out where one is served.
        """
        request = requests.answer_request(question, passages, {"min_interval_ms": 250, **options})
        return cast(Answer, await self._collect(_answer, request, timeout, Answer))

    def answer_stream(
        self, question: str, passages: Iterable[requests.Passage], *, timeout: float | None = None, **options: Any
    ) -> AsyncIterator[Chunk]:
        """The same, as it is made; `chunk.so_far` is an `Answer`."""
        return self._stream(_answer, requests.answer_request(question, passages, options), timeout, Answer)

    # ---- the mesh

    async def instances(
        self, *, kind: str = "", model: str = "", timeout: float | None = None
    ) -> list[mesh_pb2.Instance]:
        """What is registered, rejected entries among them."""
        request = mesh_pb2.ListInstancesRequest(kind=kind, model=model)
        reply, _ = await self._unary(lambda channel: MeshServiceStub(channel).ListInstances, request, timeout)
        return list(reply.instances)

    async def groups(self, *, kind: str = "", model: str = "", timeout: float | None = None) -> list[mesh_pb2.Group]:
        """Groups of instances that are scaled, with how many replicas this gateway wants of each."""
        request = mesh_pb2.ListInstancesRequest(kind=kind, model=model)
        reply, _ = await self._unary(lambda channel: MeshServiceStub(channel).ListInstances, request, timeout)
        return list(reply.groups)

    async def explain(self, request: mesh_pb2.ExplainRequest, *, timeout: float | None = None) -> str:
        """The decision record, in JSON."""
        reply, _ = await self._unary(lambda channel: MeshServiceStub(channel).Explain, request, timeout)
        return str(reply.decision_json)

    async def drain(self, instance_id: str, *, grace_ms: int | None = None, timeout: float | None = None) -> int:
        """Lets an instance finish its work and leave (operator's key). Returns how many requests it still runs."""
        request = mesh_pb2.DrainInstanceRequest(instance_id=instance_id, grace_ms=grace_ms)
        reply, _ = await self._unary(lambda channel: MeshServiceStub(channel).DrainInstance, request, timeout)
        return int(reply.running)

    async def record(self) -> AsyncGenerator[mesh_pb2.RecordTrafficResponse, None]:
        """The traffic of one gateway from now on, without prompts (operator's key); something comes at least every
        second. Closing the iterator ends it."""
        channel = self._channel(await self._reach())
        call: Any = MeshServiceStub(channel).RecordTraffic(mesh_pb2.RecordTrafficRequest(), metadata=self._metadata)
        came = 0
        try:
            async for message in call:
                came += 1
                yield message
        except grpc.aio.AioRpcError as error:
            raise self._error(error, got=f"{came} messages" if came else "") from None
        finally:
            call.cancel()

    async def undrain(self, instance_id: str, *, timeout: float | None = None) -> int:
        """Takes back a drain that is under way (operator's key). Returns how many requests it runs."""
        request = mesh_pb2.DrainInstanceRequest(instance_id=instance_id, undo=True)
        reply, _ = await self._unary(lambda channel: MeshServiceStub(channel).DrainInstance, request, timeout)
        return int(reply.running)

    async def ban(
        self, instance_id: str, *, why: str = "", by: str = "", for_s: float | None = None, timeout: float | None = None
    ) -> None:
        """Takes an instance out of work on all gateways, for `for_s` seconds or until `unban` (operator's key)."""
        for_ms = None if for_s is None else max(1, round(for_s * 1000))
        request = mesh_pb2.BanInstanceRequest(instance_id=instance_id, why=why, by=by, for_ms=for_ms)
        await self._unary(lambda channel: MeshServiceStub(channel).BanInstance, request, timeout)

    async def unban(self, instance_id: str, *, by: str = "", timeout: float | None = None) -> None:
        """Lifts a ban (operator's key)."""
        request = mesh_pb2.BanInstanceRequest(instance_id=instance_id, by=by, lift=True)
        await self._unary(lambda channel: MeshServiceStub(channel).BanInstance, request, timeout)


def _chat(channel: grpc.aio.Channel) -> Any:
    return LanguageModelServiceStub(channel).Chat


def _complete(channel: grpc.aio.Channel) -> Any:
    return LanguageModelServiceStub(channel).Complete


def _answer(channel: grpc.aio.Channel) -> Any:
    return RetrieveServiceStub(channel).Answer


async def _each(batches: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(batches, AsyncIterable):
        async for batch in batches:
            yield batch
    else:
        for batch in batches:
            yield batch
