"""OpenTelemetry's spans out of one process, over OTLP/gRPC, on the process's own loop.

The library's exporter has a thread, a blocking channel and no count of what it loses; a loop that must not wait wants
neither (docs/decisions/0030-spans-on-the-loop.md). What cannot be sent is dropped and counted: the queue holds bytes
and is bounded, one call is under way at a time, and no request ever waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog

import infermesh
from registry.endpoint import Endpoint
from services.chassis import telemetry_encode as encode
from services.chassis import telemetry_names as names

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from services.chassis.telemetry_spans import Notes, Tracer

QUEUE = 4 << 20  # bytes of spans that wait; one of ours has about 1,000
BATCH = 256 << 10  # bytes of one call; a collector takes 4 MiB
PIECE = 16  # requests whose spans are made in one turn of the loop: about 0.5 ms, half of what each alone would take
EVERY_S = 1.0
SEND_S = 5.0
CLOSE_S = 2.0
PATH = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
# No pings of ours: a collector takes one in five minutes and hangs up on more. The proxy is for the internet.
OPTIONS = (("grpc.enable_http_proxy", 0),)
# The W3C headers of the call that this task serves, for engines that make spans of their own; empty = spans are off.
BELOW: ContextVar[Mapping[str, str]] = ContextVar("below", default=MappingProxyType({}))
log = structlog.get_logger("telemetry")


class Export:
    """Made, called and closed on one event loop. `sent` and `dropped` count spans. `whose`: of `encode.origin`."""

    def __init__(self, endpoint: str, whose: tuple[bytes, bytes, bytes]) -> None:
        secure, target = endpoint.startswith("https://"), target_of(endpoint)
        self._channel = (
            grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), OPTIONS)
            if secure
            else grpc.aio.insecure_channel(target, OPTIONS)
        )
        self._call: Any = self._channel.unary_unary(PATH)
        self._whose = whose
        self._queue: deque[bytes] = deque()
        self.held = 0  # bytes in the queue
        self._notes: list[Notes] = []
        self._due = asyncio.Event()
        self._failing = False
        self.sent = self.dropped = 0
        self.on_drop: Callable[[int], None] = lambda spans: None
        self._task = asyncio.create_task(self._run(), name="spans")

    def take(self, span: ReadableSpan) -> None:
        """A span that is over."""
        if self.held >= QUEUE:
            self._drop(1)
            return
        try:
            encoded = encode.span(span)
        except Exception:  # a fault of ours is no fault of the request
            self._drop(1)
            log.exception("a span cannot be encoded", span=span.name)
            return
        self._queue.append(encoded)
        self.held += len(encoded)
        if self.held >= BATCH:
            self._due.set()

    def note(self, notes: Notes) -> None:
        """A request that is over, whose spans are still to be made."""
        self._notes.append(notes)
        if len(self._notes) == PIECE:
            asyncio.get_running_loop().call_soon(self._write_out)

    def _write_out(self) -> None:
        pending, self._notes = self._notes, []
        for notes in pending:
            if self.held >= QUEUE:
                self._drop(notes.spans)
                continue
            try:
                made = list(notes.made())
            except Exception:
                self._drop(notes.spans)
                log.exception("the spans of a request cannot be made")
                continue
            for span in made:
                self.take(span)

    async def close(self) -> None:
        """Sends what is left, if the collector takes it within `CLOSE_S`."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._write_out()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while self._queue:
                    await self._send(CLOSE_S)
        if self._queue:
            self._drop(len(self._queue))
            self._queue.clear()
        await self._channel.close()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._due.wait()
            self._due.clear()
            self._write_out()
            while self._queue:
                await self._send(SEND_S)

    def _batch(self) -> list[bytes]:
        batch: list[bytes] = []
        size = 0
        while self._queue and size < BATCH:
            batch.append(self._queue.popleft())
            size += len(batch[-1])
        self.held -= size
        return batch

    async def _send(self, timeout_s: float) -> None:
        batch = self._batch()
        try:
            await self._call(encode.request(self._whose, batch), timeout=timeout_s, wait_for_ready=True)
        except asyncio.CancelledError:
            self._queue.extendleft(reversed(batch))
            self.held += sum(map(len, batch))
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


class Telemetry:
    """The spans of one process. Traces that begin here are kept by `ratio`; others as their caller decided."""

    def __init__(self, endpoint: str, resource: Mapping[str, str | int], ratio: float, scope: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        from services.chassis.telemetry_spans import Tracer

        whole = Resource.create(dict(resource), names.SEMCONV)
        version = infermesh.__version__
        self.export = Export(endpoint, encode.origin(whole.attributes, scope, version, names.SEMCONV))
        about = InstrumentationScope(scope, version, names.SEMCONV)
        self.tracer: Tracer = Tracer(self.export.take, whole, about, ratio)

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
    if not (host and colon and port.isdecimal()) or "/" in target:
        raise ValueError(f"{endpoint!r} is not http://HOST:PORT (OTLP over gRPC, mostly port 4317)")
    return target
