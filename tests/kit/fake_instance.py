"""An instance in the test's own process: a real gRPC server whose every answer the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc

from infermesh.transport import server_options
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import worker_pb2 as wk
from infermesh.v1 import worker_pb2_grpc
from infermesh.v1.inference_pb2 import Usage
from registry.endpoint import Capacity, Endpoint
from services.chassis.rpc import stream

Handler = Callable[["FakeInstance", Any, Any], Awaitable[None]]


async def three_words(self: FakeInstance, request: Any, context: Any) -> None:
    await self.begin(context)
    for i in range(3):
        event = lm.ChatResponse(deltas=[lm.Delta(token_ids=[i], content=f" w{i}")])
        if i == 0:
            event.started.CopyFrom(lm.Started(id="x", instance_id=self.endpoint.id, prompt_tokens=5))
        if i == 2:
            event.usage.CopyFrom(Usage(prompt_tokens=5, completion_tokens=3))
        await context.write(event)


@dataclass
class FakeInstance(worker_pb2_grpc.WorkerServiceServicer):
    endpoint: Endpoint
    chat: Handler = three_words
    hello_id: str = ""
    answers_as: str = ""
    requests: list[Any] = field(default_factory=list)
    links: int = 0
    cancelled: int = 0
    frames: asyncio.Queue[wk.LinkResponse] = field(default_factory=asyncio.Queue)
    server: Any = None

    async def begin(self, context: Any) -> None:
        name = self.answers_as or self.endpoint.id
        await context.send_initial_metadata((("x-infermesh-instance-id", name), ("x-infermesh-model-id", "m")))

    async def on_chat(self, request: lm.ChatRequest, context: Any) -> None:
        self.requests.append(request)
        try:
            await self.chat(self, request, context)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def on_embed(self, request: em.EmbedRequest, context: Any) -> em.EmbedResponse:
        self.requests.append(request)
        if request.texts[0].startswith("slow"):
            await asyncio.sleep(0.1)
        await self.begin(context)
        reply = em.EmbedResponse(model="m", usage=Usage(prompt_tokens=len(request.texts)))
        for text in request.texts:
            reply.vectors.add(packed=text.encode())
        return reply

    @stream
    async def Link(self, frames: Any, context: Any) -> AsyncIterator[wk.LinkResponse]:
        await anext(aiter(frames))
        self.links += 1
        hello = wk.WorkerHello(instance_id=self.hello_id or self.endpoint.id, incarnation=self.endpoint.incarnation)
        yield wk.LinkResponse(hello=hello)
        while True:
            yield await self.frames.get()


@asynccontextmanager
async def fake_instance(
    id: str, chat: Handler = three_words, *, max_running: int = 0, kind: str = "llm", **more: Any
) -> AsyncIterator[FakeInstance]:
    server = grpc.aio.server(options=server_options(max_streams=512))
    port = server.add_insecure_port("127.0.0.1:0")
    endpoint = Endpoint(id, kind, "127.0.0.1", port, "m", 7, capacity=Capacity(max_running=max_running))
    instance = FakeInstance(endpoint, chat, **more)
    instance.server = server
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(instance, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    chat_handler = grpc.unary_stream_rpc_method_handler(
        instance.on_chat, lm.ChatRequest.FromString, lm.ChatResponse.SerializeToString
    )
    embed_handler = grpc.unary_unary_rpc_method_handler(
        instance.on_embed, em.EmbedRequest.FromString, em.EmbedResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("infermesh.v1.LanguageModelService", {"Chat": chat_handler}),
            grpc.method_handlers_generic_handler("infermesh.v1.EmbeddingService", {"Embed": embed_handler}),
        )
    )
    await server.start()
    try:
        yield instance
    finally:
        await instance.server.stop(0)
