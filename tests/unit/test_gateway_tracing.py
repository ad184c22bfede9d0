"""Spans reach a collector over OTLP, say who really answered, carry the trace on, and never the prompt."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
import pytest
from opentelemetry.trace import SpanKind

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from services.chassis import telemetry
from services.chassis.rpc import abort
from services.gateway.observe import Observe
from services.gateway.routing.decision import TERMS
from services.gateway.tracing import Tracing
from services.gateway.upstream.calls import Call, Method
from tests.kit.collector import collector
from tests.kit.fake_instance import FakeInstance, fake_instance, three_words
from tests.kit.mesh import until
from tests.kit.upstream import REQUEST_ID, Upstream, request, silent, upstream

TRACE = "0af7651916cd43dd8448eb211c80319c"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def traced(up: Upstream, endpoint: str, ratio: float = 1.0) -> Tracing:
    tracing = Tracing(endpoint, "gw", ratio)
    up.forwarder.observe = Observe(tracing)
    return tracing


def dropped(up: Upstream) -> float:
    text = up.forwarder.observe.exposition()[0].decode()
    line = next(line for line in text.splitlines() if line.startswith("infermesh_gateway_spans_dropped_total"))
    return float(line.split()[-1])


async def test_route_and_attempt_spans() -> None:
    seen: list[str] = []

    async def fails(self: FakeInstance, request: Any, context: Any) -> None:
        seen.append(dict(context.invocation_metadata())["traceparent"])
        await abort(context, MeshError(Reason.ENGINE_FAILED, "no"))

    async def works(self: FakeInstance, request: Any, context: Any) -> None:
        seen.append(dict(context.invocation_metadata())["traceparent"])
        await three_words(self, request, context)

    async with (
        collector() as sink,
        fake_instance("a", fails) as a,
        fake_instance("b", works) as b,
        upstream(a, b) as up,
    ):
        tracing = traced(up, sink.address)
        up.forwarder.draw.seed(1)
        call = Call("id-1", trace={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
        message = lm.Message(role=lm.ROLE_USER, content="canary-prompt")
        attempts = 0
        while attempts < 2:  # until the failing one came first
            async with up.forwarder.open(Method.CHAT, lm.ChatRequest(model="m", messages=[message]), call) as reply:
                async for _ in reply:
                    pass
            attempts = reply.identity.attempts
        await tracing.close()
    assert {span.trace for span in sink.spans} == {TRACE}
    route = sink.named("route")[-1]
    tries = [span for span in sink.named("attempt") if span.parent == route.id]
    assert route.parent == "b7ad6b7169203331" and route.process["service.instance.id"] == "gw"
    assert [span.attributes["infermesh.instance.id"] for span in tries] == ["a", "b"]
    assert [span.attributes["infermesh.identity.verified_by"] for span in tries] == ["link", "answer"]
    assert tries[0].attributes["error.type"] == "engine_failed" and tries[0].failed and not route.failed
    shown = route.attributes
    assert shown["gen_ai.operation.name"] == "chat" and shown["infermesh.request.id"] == "id-1"
    assert (shown["infermesh.model.id"], shown["infermesh.instance.id"]) == ("m", "b")
    assert shown["infermesh.identity.verified"] is True
    assert (shown["gen_ai.usage.input_tokens"], shown["gen_ai.usage.output_tokens"]) == (5, 3)
    assert shown["infermesh.route.chosen"] == "a"
    candidates = orjson.loads(shown["infermesh.route.record"])["candidates"]
    assert [one["id"] for one in candidates] == ["a", "b"]
    for one in candidates:
        assert list(one["terms_s"]) == list(TERMS)
        assert one["cost_s"] == pytest.approx(sum(one["terms_s"].values()) / one["weight"])
    (decision,) = [said for name, said in route.events if name == "decision"]
    assert decision["infermesh.route.chosen"] == "b"
    assert list(orjson.loads(decision["infermesh.route.record"])["rejected"]) == ["a"]
    assert [header.split("-")[2] for header in seen[-2:]] == [span.id for span in tries]
    assert "canary-prompt" not in str(sink.raw)


async def test_one_that_answers_as_another_is_caught_and_taken_out() -> None:
    async with (
        collector() as sink,
        fake_instance("a", answers_as="evil") as a,
        fake_instance("b") as b,
        upstream(a, b) as up,
    ):
        tracing = traced(up, sink.address)
        while not a.requests:
            assert (await up.chat())[1].instance_id == "b"
        assert up.state("a") == "ejected"
        instance = up.carrier.router.fleet.instances["a"]
        assert "another instance" in instance.voices.reason()
        asked = len(a.requests)
        for _ in range(10):
            await up.chat()
        assert len(a.requests) == asked, "it must get no more work"
        await tracing.close()
    caught = [span for span in sink.named("attempt") if span.attributes["infermesh.instance.id"] == "a"]
    assert [span.attributes["infermesh.identity.verified"] for span in caught] == [False]
    assert all(span.attributes["infermesh.identity.verified"] is True for span in sink.named("route"))


async def test_a_lone_liar_is_taken_out_too() -> None:
    async with fake_instance("a", answers_as="evil") as a, upstream(a) as up:
        with pytest.raises(MeshError):
            await up.chat()
        assert up.state("a") == "ejected"


async def test_cancelled_and_refused_requests_close_their_spans() -> None:
    async with collector() as sink, fake_instance("a", silent) as a, upstream(a) as up:
        tracing = traced(up, sink.address)
        task = asyncio.create_task(up.chat())
        await until(lambda: a.requests, 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(MeshError):
            async with up.forwarder.open(Method.CHAT, lm.ChatRequest(model="nope"), Call(REQUEST_ID)):
                pass
        nobody = request()
        nobody.model = "nope"
        with pytest.raises(MeshError):
            async with up.forwarder.open(Method.CHAT, nobody, Call(REQUEST_ID)):
                pass
        await tracing.close()
    cancelled, invalid, unknown = sink.named("route")
    assert cancelled.attributes["error.type"] == "cancelled" and cancelled.attributes["infermesh.instance.id"] == "a"
    assert cancelled.attributes["infermesh.identity.verified"] is True, "by the Link's hello: no answer came"
    assert [span.attributes["error.type"] for span in sink.named("attempt")] == ["cancelled"]
    assert invalid.attributes["error.type"] == "invalid_argument"
    assert unknown.attributes["error.type"] == "model_not_found" and unknown.failed


async def test_a_caller_decides_and_the_ratio_where_nobody_has() -> None:
    async with collector() as sink, fake_instance("a") as a, upstream(a) as up:
        tracing = traced(up, sink.address, ratio=0.0)
        for flag in ("00", "01"):
            call = Call(flag, trace={"traceparent": f"00-{TRACE}-b7ad6b7169203331-{flag}"})
            async with up.forwarder.open(Method.CHAT, request(), call) as reply:
                async for _ in reply:
                    pass
        for _ in range(20):
            await up.chat()
        await tracing.close()
    assert [span.attributes["infermesh.request.id"] for span in sink.named("route")] == ["01"]


@pytest.mark.parametrize("fault", ["hangs", "slow", "away"])
async def test_a_collector_that_fails_costs_nobody_time_or_memory(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "QUEUE", 64_000)
    monkeypatch.setattr(telemetry, "BATCH", 16_000)
    how = {"hangs": {"hangs": True}, "slow": {"slow_s": 0.5}, "away": {}}[fault]
    async with collector(**how) as sink, fake_instance("a") as a, upstream(a) as up:

        async def took(requests: int) -> float:
            begun = time.perf_counter()
            for _ in range(requests):
                await up.chat()
            return time.perf_counter() - begun

        off = up.forwarder.observe
        tracing = traced(up, sink.address if fault != "away" else "http://127.0.0.1:1")
        on = up.forwarder.observe
        await took(60)
        await until(lambda: sink.calls or fault == "away", 5)
        ratios = []
        for _ in range(5):
            up.forwarder.observe = off
            plain = await took(20)
            up.forwarder.observe = on
            ratios.append(await took(20) / plain)
        assert sorted(ratios)[2] < 3, f"{ratios}: spans themselves cost a little, waiting would cost seconds"
        export = tracing.export
        assert export.held < 64_000 + 4096 and export.dropped > 100 and dropped(up) == export.dropped
        begun = time.perf_counter()
        await tracing.close()
        assert time.perf_counter() - begun < 10 and export.sent + export.dropped == 2 * 160, "one is not accounted for"
        assert dropped(up) == export.dropped and (export.sent > 0) == (fault == "slow")


async def test_a_span_that_cannot_be_made_or_encoded_is_counted_and_hurts_nobody() -> None:
    async with collector() as sink, fake_instance("a") as a, upstream(a) as up:
        tracing = traced(up, sink.address)
        export = tracing.export

        class Broken:
            spans = 2

            def made(self) -> Any:
                raise ValueError("notes that make no sense")

        export.note(Broken())
        place = tracing._tracer.place({})
        export.take(tracing._tracer.made("odd", SpanKind.SERVER, place, "1" * 16, (1, 2), {"what": object()}))
        await up.chat()
        await sink.until(1, "route")
        assert export.dropped == 3 == dropped(up)
        await tracing.close()
