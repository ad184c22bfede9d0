"""One span for each call that an instance serves, below the span of the gateway's attempt.

A server interceptor of our own: it is there only where spans are exported, and knows the contract's messages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from infermesh.errors import REASON_KEY
from registry.endpoint import Endpoint
from services.chassis import telemetry_names as names
from services.chassis.identity import REQUEST_KEY
from services.chassis.rpc import Context
from services.chassis.telemetry import BELOW, Telemetry, instance_resource

if TYPE_CHECKING:
    from services.chassis.telemetry_spans import Span, Tracer

Handler = Any  # a grpc.RpcMethodHandler, which is a named tuple; its stubs do not say so


class CallSpans(grpc.aio.ServerInterceptor):
    """`serve` comes once the model is in: only then the hardware is known, and no call is served before."""

    def __init__(self, endpoint: str, ratio: float) -> None:
        self._endpoint = endpoint
        self._ratio = ratio
        self._telemetry: Telemetry | None = None
        self._tracer: Tracer | None = None
        self._who: Mapping[str, str] = {}

    def serve(self, endpoint: Endpoint) -> None:
        self._telemetry = Telemetry(self._endpoint, instance_resource(endpoint), self._ratio, "infermesh.instance")
        self._tracer = self._telemetry.tracer
        self._who = {
            names.INSTANCE_ID: endpoint.id,
            names.MODEL_ID: endpoint.model,
            names.PROVIDER: endpoint.engine or "infermesh",
            names.RPC_SYSTEM: "grpc",
        }

    async def close(self) -> None:
        if self._telemetry is not None:
            await self._telemetry.close()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        operation = names.OPERATIONS.get(path.rpartition("/")[2])
        if handler is None or operation is None or self._tracer is None:
            return handler
        if handler.unary_unary is not None:
            return handler._replace(unary_unary=self._unary(handler.unary_unary, path, operation))
        name = "unary_stream" if handler.unary_stream is not None else "stream_stream"
        return handler._replace(**{name: self._stream(getattr(handler, name), path, operation)})

    def _unary(self, behaviour: Any, path: str, operation: str) -> Any:
        async def traced(request: Any, context: Context) -> Any:
            with self._begin(request, context, path, operation) as call:
                reply = await behaviour(request, context)
                call.take(reply)
                return reply

        return traced

    def _stream(self, behaviour: Any, path: str, operation: str) -> Any:
        async def traced(request: Any, context: Context) -> AsyncIterator[Any]:
            with self._begin(request, context, path, operation) as call:
                events = behaviour(request, context)
                try:
                    async for event in events:
                        call.take(event)
                        yield event
                finally:
                    await events.aclose()

        return traced

    def _begin(self, request: Any, context: Context, path: str, operation: str) -> _Call:
        from services.chassis.telemetry_spans import Span

        tracer = self._tracer
        assert tracer is not None
        given = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        place = tracer.place(given)
        if not place.kept:
            BELOW.set(place.headers)
            return _Call(None, context)
        model = str(getattr(request, "model", ""))[:256]
        attributes = {
            **self._who,
            names.OPERATION: operation,
            names.RPC_METHOD: path.lstrip("/"),
            names.REQUEST_ID: given.get(REQUEST_KEY, ""),
            names.REQUEST_MODEL: model,
        }
        title = f"{operation} {self._who[names.MODEL_ID]}"
        span = Span(tracer, title, place, attributes)
        BELOW.set(span.headers)
        return _Call(span, context)


class _Call:
    """One call: its span, if it has one, ends with the block, however that ends."""

    __slots__ = ("_begun", "_context", "_output", "_prompt", "_span", "_waits")

    def __init__(self, span: Span | None, context: Context) -> None:
        self._span = span
        self._context = context
        self._begun = time.monotonic()
        self._waits = True  # for the first answer
        self._prompt = self._output = 0

    def take(self, message: Any) -> None:
        """An answer, or a part of it: the time of the first, and usage wherever it comes."""
        if self._span is None:
            return
        attributes = self._span.attributes
        if self._waits:
            self._waits = False
            attributes[names.FIRST_CHUNK_S] = time.monotonic() - self._begun
            if started := getattr(message, "started", None):
                self._prompt = started.prompt_tokens
        for delta in getattr(message, "deltas", ()):
            self._output += len(delta.token_ids)
        message = getattr(message, "batch", message)
        fields = message.DESCRIPTOR.fields_by_name
        if "usage" in fields and message.HasField("usage"):
            usage = message.usage
            self._prompt, self._output = usage.prompt_tokens, usage.completion_tokens
            attributes[names.CACHED_TOKENS] = usage.cached_tokens
        if model := getattr(message, "model", ""):
            attributes[names.RESPONSE_MODEL] = model

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        span = self._span
        if span is None:
            return
        span.attributes |= {names.INPUT_TOKENS: self._prompt, names.OUTPUT_TOKENS: self._output}
        status, word = "OK", ""
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            status, word = "CANCELLED", "cancelled"
        elif error is not None:
            code = self._context.code()
            status = code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
            told = {key: value for key, value in self._context.trailing_metadata() or ()}
            word = str(told.get(REASON_KEY, "internal"))
        span.attributes[names.RPC_STATUS] = status
        span.end(word)
