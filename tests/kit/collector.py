"""An OpenTelemetry collector in the test's own loop: a real gRPC receiver of OTLP spans."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from tests.kit.mesh import until

PATH = "opentelemetry.proto.collector.trace.v1.TraceService"


@dataclass
class Span:
    """One received span; `service` and `process` are of its resource."""

    name: str
    trace: str
    id: str
    parent: str
    failed: bool
    kind: str  # server, client, internal
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    process: dict[str, Any]

    @property
    def service(self) -> str:
        return str(self.process["service.name"])


@dataclass
class Collector:
    """`hangs`: takes requests and never answers; `slow_s`: answers after so long. `keep`: what comes, in `spans`, and
    in `raw` as text."""

    address: str = ""
    spans: list[Span] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    hangs: bool = False
    slow_s: float = 0.0
    keep: bool = True
    calls: int = 0

    async def export(self, request: Any, context: Any) -> Any:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp

        self.calls += 1
        if self.hangs:
            await asyncio.sleep(3600)
        if self.slow_s:
            await asyncio.sleep(self.slow_s)
        if not self.keep:
            return otlp.ExportTraceServiceResponse()
        self.raw.append(str(request))
        for of_process in request.resource_spans:
            process = _plain(of_process.resource.attributes)
            for scope in of_process.scope_spans:
                self.spans += [_span(span, process) for span in scope.spans]
        return otlp.ExportTraceServiceResponse()

    def named(self, name: str, trace: str = "") -> list[Span]:
        return [span for span in self.spans if span.name == name and trace in ("", span.trace)]

    async def until(self, count: int, name: str, timeout_s: float = 20) -> list[Span]:
        """The spans of that name, once there are so many."""
        await until(lambda: len(self.named(name)) >= count, timeout_s)
        return self.named(name)


def _span(span: Any, process: dict[str, Any]) -> Span:
    events = [(event.name, _plain(event.attributes)) for event in span.events]
    failed = span.status.code == span.status.STATUS_CODE_ERROR
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    assert span.end_time_unix_nano >= span.start_time_unix_nano > 0, "a span that was not closed"
    kind = span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower()
    return Span(span.name, *ids, failed, kind, _plain(span.attributes), events, process)


def _plain(attributes: Any) -> dict[str, Any]:
    return {item.key: _value(item.value) for item in attributes}


def _value(value: Any) -> Any:
    which = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if which == "array_value" else getattr(value, which)


@asynccontextmanager
async def collector(**how: Any) -> AsyncIterator[Collector]:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp

    made = Collector(**how)
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        made.export, otlp.ExportTraceServiceRequest.FromString, otlp.ExportTraceServiceResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(PATH, {"Export": handler}),))
    made.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield made
    finally:
        await server.stop(0)
