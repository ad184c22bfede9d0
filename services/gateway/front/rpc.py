"""The gRPC door: the contract of the instances, served by the fleet. Events pass as the bytes that came in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from infermesh.errors import MeshError, Reason, invalid
from services.chassis.identity import (
    ATTEMPTS_KEY,
    DEGRADED_KEY,
    INSTANCE_KEY,
    MODEL_KEY,
    REQUEST_KEY,
    RESUME_EXACT_KEY,
    RESUMES_KEY,
)
from services.chassis.keys import Keys
from services.chassis.rpc import Context, abort, as_mesh_error
from services.gateway.entrance import Entrance
from services.gateway.front.callers import caller, request_id, trace_context
from services.gateway.upstream.calls import Call, Forward, Identity, Method, Reply, Watcher

LANGUAGE_MODEL = "infermesh.v1.LanguageModelService"
EMBEDDING = "infermesh.v1.EmbeddingService"
RERANK = "infermesh.v1.RerankService"
RETRIEVE = "infermesh.v1.RetrieveService"
MESH = "infermesh.v1.MeshService"
_ENTRANCES = {method: Entrance(method.path.lstrip("/")) for method in Method}
_NAMES = {
    **{entrance.path: method.name.lower() for method, entrance in _ENTRANCES.items()},
    f"{EMBEDDING}/EmbedStream": "embed_stream",
    f"{RETRIEVE}/Answer": "answer",
    f"{MESH}/Pick": "direct",
}


class Door:
    """What every handler shares: who calls, how errors leave."""

    def __init__(self, forward: Forward, keys: Keys, watcher: Watcher) -> None:
        self.forward = forward
        self._keys = keys
        self.watcher = watcher

    def call(self, name: str, entrance: Entrance, context: Context) -> Call:
        """The circumstances of a call; who may not call never reaches the forwarder, and is counted here.

        Raises:
            MeshError: UNAUTHENTICATED.
        """
        given = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        remaining = context.time_remaining()
        deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
        trace = trace_context(given.get("traceparent"), given.get("tracestate"))
        id = request_id(given.get(REQUEST_KEY))
        try:
            who = caller(self._keys, given.get("authorization"))
        except MeshError as error:
            self.watcher.refused(name, error, Call(id, trace=trace, entrance=entrance))
            raise
        return Call(id, who, deadline, trace, entrance=entrance)

    def read(self, method: Method, request: bytes, context: Context) -> tuple[Any, Call]:
        """The message and its circumstances; bytes that are no message are counted here too."""
        name = method.name.lower()
        call = self.call(name, _ENTRANCES[method], context)
        try:
            return parse(method.request, request), call
        except MeshError as error:
            self.watcher.refused(name, error, call)
            raise

    def turned_away(self, details: grpc.HandlerCallDetails, error: MeshError) -> None:
        """A call that the gate refused before it came here: this gateway is starting or draining."""
        path = details.method.lstrip("/")
        name = _NAMES.get(path)
        if name is None:
            return  # callers choose paths
        given = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        trace = trace_context(given.get("traceparent"), given.get("tracestate"))
        call = Call(request_id(given.get(REQUEST_KEY)), trace=trace, entrance=Entrance(path))
        self.watcher.refused(name, error, call)

    async def unary(self, method: Method, request: bytes, context: Context) -> bytes:
        try:
            message, call = self.read(method, request, context)
            async with self.forward.open(method, message, call) as reply:
                async for event in reply:
                    await context.send_initial_metadata(identity(reply, call))
                    return event.raw
            raise MeshError(Reason.INTERNAL, "the instance gave no answer")
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort(context, as_mesh_error(error))
            raise

    async def stream(self, method: Method, request: bytes, context: Context) -> None:
        try:
            message, call = self.read(method, request, context)
            async with self.forward.open(method, message, call) as reply:
                await context.send_initial_metadata(identity(reply, call))
                try:
                    async for event in reply:
                        await context.write(event.raw)
                finally:
                    if reply.identity.resumes:  # the initial metadata spoke of the first instance
                        context.set_trailing_metadata(resumed(reply.identity))
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort(context, as_mesh_error(error))


def parse(kind: Any, request: bytes) -> Any:
    try:
        return kind.FromString(request)
    except DecodeError:
        raise invalid("request", f"these bytes are no {kind.DESCRIPTOR.name}") from None


def identity(reply: Reply, call: Call) -> tuple[tuple[str, str], ...]:
    who = reply.identity
    pairs = (*ids(who), (ATTEMPTS_KEY, str(who.attempts)), (REQUEST_KEY, call.request_id))
    return (*pairs, (DEGRADED_KEY, who.degraded)) if who.degraded else pairs


def ids(who: Identity) -> tuple[tuple[str, str], ...]:
    """Who answers, as far as the caller may know."""
    return tuple((key, id) for key, id in zip((INSTANCE_KEY, MODEL_KEY), who.shown, strict=True) if id)


def resumed(who: Identity) -> tuple[tuple[str, str], ...]:
    return (
        *ids(who)[:1],
        (ATTEMPTS_KEY, str(who.attempts)),
        (RESUMES_KEY, str(who.resumes)),
        (RESUME_EXACT_KEY, str(who.exact).lower()),
    )


def handlers(
    door: Door, embed_stream: Callable[..., Awaitable[None]], answer: Callable[..., Awaitable[None]]
) -> tuple[grpc.GenericRpcHandler, ...]:
    """The model services. Handlers take and give bytes: no message is encoded twice."""
    services: dict[str, dict[str, grpc.RpcMethodHandler]] = {}
    for method in Method:
        _, service, name = method.path.split("/")
        services.setdefault(service, {})[name] = _handler(door, method)

    async def stream(requests: Any, context: Context) -> None:  # grpc takes only real coroutine functions
        await embed_stream(requests, context)

    services[EMBEDDING]["EmbedStream"] = grpc.stream_stream_rpc_method_handler(stream)

    async def answers(request: bytes, context: Context) -> None:
        await answer(request, context)

    services[RETRIEVE] = {"Answer": grpc.unary_stream_rpc_method_handler(answers)}
    return tuple(grpc.method_handlers_generic_handler(name, methods) for name, methods in services.items())


def _handler(door: Door, method: Method) -> grpc.RpcMethodHandler:
    if method.streams:

        async def stream(request: bytes, context: Context) -> None:
            await door.stream(method, request, context)

        return grpc.unary_stream_rpc_method_handler(stream)

    async def unary(request: bytes, context: Context) -> bytes:
        return await door.unary(method, request, context)

    return grpc.unary_unary_rpc_method_handler(unary)
