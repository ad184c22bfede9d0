"""From exceptions to gRPC statuses: the edge of every servicer.

`unary` and `stream` wrap a handler method `(self, request, context)`. Whatever it raises ends the call with the status
and the trailers of the one error table; what is not a `MeshError` is logged with its traceback and told to nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from typing import Any

import grpc.aio
import structlog

from infermesh.errors import MeshError, Reason, from_rpc, to_trailers

Context = grpc.aio.ServicerContext
MAX_DETAILS_BYTES = 4096
log = structlog.get_logger("rpc")


def as_mesh_error(error: BaseException) -> MeshError:
    """Any exception as a typed error; unknown ones become INTERNAL and are logged here, once."""
    if isinstance(error, MeshError):
        return error
    if isinstance(error, grpc.RpcError):
        return from_rpc(error)
    log.error("unexpected error", exc_info=error)
    return MeshError(Reason.INTERNAL, "an internal error; the server's log tells more")


async def abort(context: Context, error: MeshError) -> None:
    """Ends the call with the error. Does not return."""
    said = tuple(context.trailing_metadata() or ())
    trailers = said + tuple(pair for pair in to_trailers(error) if pair[0] not in dict(said))
    await context.abort(error.row.grpc, details(error.message), trailers)


def details(message: str) -> str:
    """As much of the message as headers carry: gRPC writes what is not printable ASCII as `%XX`, and a client with
    the library's own limits (8 KiB) would see a broken call instead of the error."""
    size = 0
    for index, char in enumerate(message):
        size += 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode("utf-8", "replace"))
        if size > MAX_DETAILS_BYTES:
            return message[:index]
    return message


def unary(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @wraps(handler)
    async def answer(self: object, request: object, context: Context) -> Any:
        try:
            if isinstance(request, MeshError):  # it could not be decoded, see server.py
                raise request
            return await handler(self, request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await abort(context, as_mesh_error(error))

    return answer


def stream(handler: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    @wraps(handler)
    async def answer(self: object, request: object, context: Context) -> AsyncIterator[Any]:
        if isinstance(request, MeshError):  # it could not be decoded, see server.py
            await abort(context, request)
        events = handler(self, request, context)
        try:
            async for event in events:
                yield event
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            await abort(context, as_mesh_error(error))
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    return answer
