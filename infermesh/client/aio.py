"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Self, Unpack, cast

import grpc
import grpc.aio

from infermesh.client import addresses as where
from infermesh.client import requests
from infermesh.client.results import Answer, Chunk, Completion, Embeddings, Rerank, Served, rerank_result, served
from infermesh.transport import channel_options, open_aio_channel, trust
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import mesh_pb2
from infermesh.v1.embedding_pb2_grpc import EmbeddingServiceStub
from infermesh.v1.language_model_pb2_grpc import LanguageModelServiceStub
from infermesh.v1.mesh_pb2_grpc import MeshServiceStub
from infermesh.v1.rerank_pb2_grpc import RerankServiceStub
from infermesh.v1.retrieve_pb2_grpc import RetrieveServiceStub

IN_FLIGHT = 8  # batches of an embed_stream that wait for their vectors


class AsyncClient:
    """Speaks to the gateways at `addresses` ("host:port,host:port"): to one, until it dies, then to the next.
    "grpcs://host:port" is for TLS; `ca_file` names the authority where it is none of those that grpc knows.

    `timeout` is seconds for a whole call and can be given a call; None waits for ever. Every method raises `MeshError`.
    """

    def __init__(
        self,
        addresses: str | Sequence[str] = where.DEFAULT,
        *,
        api_key: str = "",
        timeout: float | None = 600,
        wan: bool = False,
        ca_file: str = "",
    ) -> None:
        self.addresses, secure = where.split(addresses)
        self._tls = trust(ca_file) if secure else None
        self.timeout = timeout
        self._metadata = where.metadata(api_key)
        self._rotation = where.Rotation(len(self.addresses))
        self._options = channel_options(wan=wan)
        self._channels: dict[int, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))

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

    # ---- calls

    def _channel(self, index: int) -> grpc.aio.Channel:
        if index not in self._channels:
            self._channels[index] = open_aio_channel(self.addresses[index], self._options, self._tls)
        return self._channels[index]

    def _seconds(self, timeout: float | None) -> float | None:
        return self.timeout if timeout is None else timeout

    def _error(self, error: grpc.aio.AioRpcError, *, got: str = "") -> Exception:
        details = error.details() or ""
        return where.as_error(error.code(), details, error.trailing_metadata(), self.addresses, got=got)

    async def _unary(
        self, method: Callable[[grpc.aio.Channel], Any], request: Any, timeout: float | None
    ) -> tuple[Any, Served]:
        seconds = self._seconds(timeout)
        started = asyncio.get_running_loop().time()
        order = self._rotation.order()
        for index in order:
            left = None if seconds is None else seconds - (asyncio.get_running_loop().time() - started)
            call = method(self._channel(index))(request, timeout=left, metadata=self._metadata)
            try:
                reply = await call
            except grpc.aio.AioRpcError as error:
                if index != order[-1] and where.try_next(error.code(), _pairs(error.trailing_metadata())):
                    continue
                raise self._error(error) from None
            self._rotation.answered(index)
            return reply, served(_pairs(await call.initial_metadata()))
        raise AssertionError("there is at least one address")

    async def _stream(
        self,
        method: Callable[[grpc.aio.Channel], Any],
        request: Any,
        timeout: float | None,
        begin: type[Completion] = Completion,
        *,
        whole: bool = False,
    ) -> AsyncIterator[Chunk]:
        """`whole`: nobody has seen any of it before its end, so that another gateway may begin it anew."""
        seconds = self._seconds(timeout)
        started = asyncio.get_running_loop().time()
        order = self._rotation.order()
        for index in order:
            left = None if seconds is None else seconds - (asyncio.get_running_loop().time() - started)
            call = method(self._channel(index))(request, timeout=left, metadata=self._metadata)
            answer, begun = begin(), False
            try:
                async for event in call:
                    if not begun:
                        begun = True
                        self._rotation.answered(index)
                        answer.served = served(_pairs(await call.initial_metadata()))
                    yield Chunk(answer.add(event), answer)
                answer.served = answer.served.at_the_end(_pairs(await call.trailing_metadata()))
                return
            except grpc.aio.AioRpcError as error:
                again = (whole or not begun) and index != order[-1]
                if again and where.try_next(error.code(), _pairs(error.trailing_metadata())):
                    continue
                raise self._error(error, got=answer.got if begun else "") from None
            finally:
                call.cancel()

    async def _collect(
        self,
        method: Callable[[grpc.aio.Channel], Any],
        request: Any,
        timeout: float | None,
        begin: type[Completion] = Completion,
    ) -> Completion:
        answer = begin()
        async for chunk in self._stream(method, request, timeout, begin, whole=True):
            answer = chunk.so_far
        return answer

    async def _reach(self) -> int:
        """The first gateway that serves: a client stream cannot be sent twice."""
        for index in self._rotation.order():
            check: Any = self._channel(index).unary_unary(where.HEALTH)
            try:
                if await check(b"", timeout=where.PROBE_S) != where.SERVING:
                    continue
            except grpc.aio.AioRpcError as error:
                if error.code() in where.AWAY:
                    continue
            self._rotation.answered(index)
            return index
        raise where.as_error(grpc.StatusCode.UNAVAILABLE, "no connection", (), self.addresses)


def _chat(channel: grpc.aio.Channel) -> Any:
    return LanguageModelServiceStub(channel).Chat


def _complete(channel: grpc.aio.Channel) -> Any:
    return LanguageModelServiceStub(channel).Complete


def _answer(channel: grpc.aio.Channel) -> Any:
    return RetrieveServiceStub(channel).Answer


def _pairs(metadata: Any) -> list[tuple[str, str | bytes]]:
    return [(item[0], item[1]) for item in metadata or ()]


async def _each(batches: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(batches, AsyncIterable):
        async for batch in batches:
            yield batch
    else:
        for batch in batches:
            yield batch
