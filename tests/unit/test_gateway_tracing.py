"""Spans reach a collector over OTLP, carry the trace on to the instance, and never the prompt."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from services.chassis.rpc import abort
from services.gateway.observe import Observe
from services.gateway.tracing import Tracing
from services.gateway.upstream.calls import Call, Method
from tests.kit.fake_instance import FakeInstance, fake_instance, three_words
from tests.kit.upstream import upstream

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_route_and_attempt_spans() -> None:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp

    got: list[Any] = []
    seen: list[str] = []

    async def export(request: Any, context: Any) -> Any:
        got.extend(s for r in request.resource_spans for x in r.scope_spans for s in x.spans)
        return otlp.ExportTraceServiceResponse()

    async def fails(self: FakeInstance, request: Any, context: Any) -> None:
        seen.append(dict(context.invocation_metadata())["traceparent"])
        await abort(context, MeshError(Reason.ENGINE_FAILED, "no"))

    async def works(self: FakeInstance, request: Any, context: Any) -> None:
        seen.append(dict(context.invocation_metadata())["traceparent"])
        await three_words(self, request, context)

    collector = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        export, otlp.ExportTraceServiceRequest.FromString, otlp.ExportTraceServiceResponse.SerializeToString
    )
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    collector.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
    port = collector.add_insecure_port("127.0.0.1:0")
    await collector.start()
    tracing = Tracing(f"http://127.0.0.1:{port}", "gw")
    async with fake_instance("a", fails) as a, fake_instance("b", works) as b, upstream(a, b) as up:
        up.forwarder.observe = Observe(tracing)
        up.forwarder.draw.seed(1)
        call = Call("id-1", trace={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
        message = lm.Message(role=lm.ROLE_USER, content="canary-prompt")
        attempts = 0
        while attempts < 2:  # until the failing one came first
            request = lm.ChatRequest(model="m", messages=[message])
            async with up.forwarder.open(Method.CHAT, request, call) as reply:
                async for _ in reply:
                    pass
            attempts = reply.identity.attempts
    await asyncio.to_thread(tracing.close)
    await collector.stop(0)
    spans = [span for span in got if span.trace_id.hex() == TRACE]
    assert len(spans) == len(got)
    route = [span for span in spans if span.name == "route"][-1]
    tries = [span for span in spans if span.name == "attempt" and span.parent_span_id == route.span_id]
    assert route.parent_span_id.hex() == "b7ad6b7169203331" and len(tries) == 2

    def attributes(span: Any) -> dict[str, Any]:
        return {item.key: item.value for item in span.attributes}

    assert [attributes(span)["infermesh.instance.id"].string_value for span in tries] == ["a", "b"]
    assert attributes(tries[0])["error.type"].string_value == "engine_failed"
    shown = attributes(route)
    assert shown["gen_ai.operation.name"].string_value == "chat"
    assert shown["infermesh.model.id"].string_value == "m" and shown["infermesh.instance.id"].string_value == "b"
    assert (shown["gen_ai.usage.input_tokens"].int_value, shown["gen_ai.usage.output_tokens"].int_value) == (5, 3)
    assert [header.split("-")[2] for header in seen[-2:]] == [span.span_id.hex() for span in tries]
    assert "canary-prompt" not in str(got)
