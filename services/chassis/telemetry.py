"""OpenTelemetry's spans out of one process, over OTLP/gRPC, on the process's own loop.

The library's exporter has a thread, a blocking channel and no count of what it loses; a loop that must not wait wants
neither (docs/decisions/0030-spans-on-the-loop.md). What cannot be sent is dropped and counted: the queue is bounded,
one call is under way at a time, and no request ever waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog

import infermesh
from registry.endpoint import Endpoint
from services.chassis import telemetry_names as names

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Tracer

QUEUE = 4096  # spans
BATCH = 256  # spans of one call
PIECE = 16  # spans encoded in one turn of the loop: about 2 ms
EVERY_S = 1.0
SEND_S = 5.0
CLOSE_S = 2.0
PATH = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
# No pings of ours: a collector takes one in five minutes and hangs up on more. The proxy is for the internet.
OPTIONS = (("grpc.enable_http_proxy", 0),)
log = structlog.get_logger("telemetry")


class Export:
    """An SDK span processor. Made, called and closed on one event loop. `sent` and `dropped` count spans."""

    def __init__(self, endpoint: str) -> None:
        secure, target = endpoint.startswith("https://"), target_of(endpoint)
        self._channel = (
            grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), OPTIONS)
            if secure
            else grpc.aio.insecure_channel(target, OPTIONS)
        )
        self._call: Any = self._channel.unary_unary(PATH)
        self._queue: deque[ReadableSpan] = deque()
        self._due = asyncio.Event()
        self._failing = False
        self.sent = self.dropped = 0
        self.on_drop: Callable[[int], None] = lambda spans: None
        self._task = asyncio.create_task(self._run(), name="spans")

    def on_start(self, span: object, parent_context: object = None) -> None:
        pass

    def _on_ending(self, span: object) -> None:  # the SDK calls it on every processor
        pass

    def on_end(self, span: ReadableSpan) -> None:
        if len(self._queue) >= QUEUE:
            self._drop(1)
            return
        self._queue.append(span)
        if len(self._queue) >= BATCH:
            self._due.set()

    async def close(self) -> None:
        """Sends what is left, if the collector takes it within `CLOSE_S`."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while self._queue:
                    await self._send(CLOSE_S)
        if self._queue:
            self._drop(len(self._queue))
            self._queue.clear()
        await self._channel.close()

    def shutdown(self) -> None:
        """The SDK's way to end it; ours is `close`."""

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._due.wait()
            self._due.clear()
            while self._queue:
                await self._send(SEND_S)

    async def _send(self, timeout_s: float) -> None:
        batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
        try:
            encoded = [await _encoded(batch[start : start + PIECE]) for start in range(0, len(batch), PIECE)]
            # Pieces of a repeated field, one after the other, are the whole field.
            await self._call(b"".join(encoded), timeout=timeout_s, wait_for_ready=True)
        except asyncio.CancelledError:
            self._queue.extendleft(reversed(batch))
            raise
        except Exception as error:
            self._drop(len(batch))
            if not self._failing:
                self._failing = True
                why = error.code().name if isinstance(error, grpc.aio.AioRpcError) else repr(error)
                log.warning("the collector takes no spans; they are dropped until it does", why=why)
            await asyncio.sleep(EVERY_S)
        else:
            self.sent += len(batch)
            if self._failing:
                self._failing = False
                log.info("the collector takes spans again", dropped=self.dropped)

    def _drop(self, spans: int) -> None:
        self.dropped += spans
        self.on_drop(spans)


async def _encoded(spans: list[ReadableSpan]) -> bytes:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    encoded: bytes = encode_spans(spans).SerializeToString()
    await asyncio.sleep(0)
    return encoded


class Telemetry:
    """The spans of one process. Traces that begin here are kept by `ratio`; others as their caller decided."""

    def __init__(self, endpoint: str, resource: Mapping[str, str | int], ratio: float = 1.0) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

        self.export = Export(endpoint)
        self._provider = TracerProvider(
            ParentBasedTraceIdRatio(ratio), Resource.create(dict(resource), names.SEMCONV), shutdown_on_exit=False
        )
        self._provider.add_span_processor(self.export)  # type: ignore[arg-type]

    def tracer(self, scope: str) -> Tracer:
        return self._provider.get_tracer(scope, infermesh.__version__, names.SEMCONV)

    async def close(self) -> None:
        await self.export.close()


def process_resource(service: str, instance_id: str) -> dict[str, str | int]:
    """Who this process is."""
    return {
        names.SERVICE_NAMESPACE: "infermesh",
        names.SERVICE_NAME: f"infermesh-{service}",
        names.SERVICE_INSTANCE: instance_id,
        names.SERVICE_VERSION: infermesh.__version__,
        names.HOST_NAME: socket.gethostname(),
    }


def instance_resource(endpoint: Endpoint) -> dict[str, str | int]:
    """An instance, and what it runs on."""
    hardware = endpoint.hardware
    found: dict[str, str | int] = {
        **process_resource(endpoint.kind, endpoint.id),
        names.MODEL_ID: endpoint.model,
        names.INCARNATION: f"{endpoint.incarnation:016x}",
        names.HW_TYPE: "cpu" if hardware.device.startswith("cpu") else "gpu",
        names.HW_MODEL: hardware.device,
        names.HW_COUNT: hardware.count,
        names.HW_MEMORY: hardware.memory_mib,
        names.ENGINE: endpoint.engine,
        names.ENGINE_VERSION: endpoint.engine_version,
    }
    return {name: value for name, value in found.items() if value}


def target_of(endpoint: str) -> str:
    """HOST:PORT of an OTLP endpoint.

    Raises:
        ValueError: it is none.
    """
    target = endpoint.removeprefix("https://").removeprefix("http://").rstrip("/")
    host, colon, port = target.rpartition(":")
    if not (host and colon and port.isdigit()) or "/" in target:
        raise ValueError(f"{endpoint!r} is not http://HOST:PORT (OTLP over gRPC, mostly port 4317)")
    return target
