"""The gRPC server of every process: settings, health, reflection, and the gate before the model services."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import Enum

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from infermesh.errors import MeshError, Reason
from infermesh.transport import server_options
from services.chassis.certificates import Certificate
from services.chassis.rpc import Context, abort

Handler = grpc.RpcMethodHandler
OURS = "/infermesh."  # their handlers are `rpc.unary` and `rpc.stream`, which know what could not be decoded


class Phase(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Gate(grpc.aio.ServerInterceptor):
    """Refuses calls to what is guarded while the process is starting or draining; they may go elsewhere."""

    def __init__(self, guarded: Iterable[str], methods: Iterable[str] = ()) -> None:
        self.phase = Phase.STARTING
        self._guarded = (*(f"/{name}/" for name in guarded), *(f"/{name}" for name in methods))
        self._handlers: dict[str, Handler] = {}
        self.on_refusal: Callable[[grpc.HandlerCallDetails, MeshError], None] = lambda call, error: None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        method = handler_call_details.method
        if not method.startswith(OURS):
            return await continuation(handler_call_details)
        if self.phase is not Phase.SERVING and method.startswith(self._guarded):
            error = _REFUSED[self.phase]
            self.on_refusal(handler_call_details, error)
            return _REFUSALS[self.phase]
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return handler
            self._handlers[method] = _decoding(handler)
        return self._handlers[method]


def _decoding(handler: Handler) -> Handler:
    """The same handler; a request that cannot be decoded reaches `rpc.unary` and `rpc.stream` as the error it is.
    grpc itself would answer UNKNOWN and log a traceback for it.
    """
    decode = handler.request_deserializer
    if decode is None:
        return handler

    def attempt(data: bytes) -> object:
        try:
            return decode(data)
        except DecodeError:
            return MeshError(Reason.INVALID_ARGUMENT, "the request is not a message of this type")

    return handler._replace(request_deserializer=attempt)  # type: ignore[attr-defined]


def _refusal(error: MeshError) -> Handler:
    async def refuse(request: bytes, context: Context) -> bytes:
        await abort(context, error)
        return b""

    return grpc.unary_unary_rpc_method_handler(refuse)


_REFUSED = {
    Phase.STARTING: MeshError(Reason.STARTING, "still loading", retry_after_s=1),
    Phase.DRAINING: MeshError(Reason.DRAINING, "this process is draining", retry_after_s=1),
}
_REFUSALS = {phase: _refusal(error) for phase, error in _REFUSED.items()}


class Server:
    """A grpc.aio server with health, reflection and a gate; the process's own servicers are added to `grpc`. `methods`:
    single ones that the gate guards, too. `inner`: interceptors behind it."""

    def __init__(
        self,
        guarded: Sequence[str],
        *,
        methods: Sequence[str] = (),
        max_streams: int | None = None,
        debug: bool = False,
        inner: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self.gate = Gate(guarded, methods)
        self.grpc = grpc.aio.server(interceptors=(self.gate, *inner), options=server_options(max_streams=max_streams))
        self._health = health.aio.HealthServicer()
        self._names = (*guarded, "")
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        if debug:
            channelz.add_channelz_servicer(self.grpc)

    async def start(
        self, listen: str, others: Sequence[str] = (), certificate: Certificate | None = None, own: str = ""
    ) -> int:
        """Binds and serves (NOT_SERVING, until `enter`). Returns the port. `others`: service names for reflection.
        `own`: a second address, always in the clear, by which the process reaches itself.

        Raises:
            OSError: the address cannot be bound.
        """
        names = [name for name in (*self._names, *others) if name]
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            if certificate is None:
                port = self.grpc.add_insecure_port(listen)
            else:
                port = self.grpc.add_secure_port(listen, certificate.credentials())
            if own:
                self.grpc.add_insecure_port(own)
        except RuntimeError:
            raise OSError(f"cannot listen on {listen}: is the port taken? Choose another one, or 0 for any") from None
        await self.grpc.start()
        return port

    async def enter(self, phase: Phase) -> None:
        self.gate.phase = phase
        status = health_pb2.HealthCheckResponse
        await self._set_health(status.SERVING if phase is Phase.SERVING else status.NOT_SERVING)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        await self.grpc.stop(grace_s)
