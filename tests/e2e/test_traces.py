"""Traces from the client to the engines, over real processes, as a collector gets them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import aiohttp
import grpc.aio
import pytest

from infermesh.v1 import language_model_pb2 as lm
from tests.kit.collector import Span, collector
from tests.kit.mesh import TestMesh, running_mesh, until

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PACE = ("--prefill-tps", "100000", "--step-ms", "10", "--max-running", "256", "--max-waiting", "1024")
REQUESTS = 1000
COUNTER = "infermesh_gateway_requests_total"


def ask(mesh: TestMesh, words: str, tokens: int, trace: str = "", id: str = "") -> grpc.aio.UnaryStreamCall:
    message = lm.Message(role=lm.ROLE_USER, content=words)
    request = lm.ChatRequest(model="chat", messages=[message], sampling=lm.Sampling(max_tokens=tokens))
    told = [("traceparent", trace)] if trace else []
    return mesh.llm.Chat(request, metadata=[*told, ("x-request-id", id or "one")])


def said(span: Span, name: str) -> object:
    return span.attributes.get(f"infermesh.{name}")


async def test_one_trace_for_a_stream_whose_instance_is_killed(tmp_path: Path) -> None:
    async with collector() as sink:
        pace = (*PACE, "--otlp", sink.address, "--device", "A800-80G")
        async with running_mesh(tmp_path, {"one": pace, "two": pace}, otlp=sink.address, id="gate") as mesh:
            call = ask(mesh, "tell me", 120, f"00-{TRACE}-{CALLER}-01")
            heard, first = 0, ""
            async for event in call:
                heard += sum(len(delta.token_ids) for delta in event.deltas)
                if event.HasField("started"):
                    first = event.started.instance_id
                if first and heard > 30 and not mesh.instances[first].ended:
                    mesh.instances[first].kill()
            assert heard == 120
            second = "two" if first == "one" else "one"
            (route,) = await sink.until(1, "route")
            tries = await sink.until(2, "attempt")
            (served,) = await sink.until(1, "chat chat")  # the first one's died with it
    spans = [route, *tries, served]
    assert {span.trace for span in spans} == {TRACE} and route.parent == CALLER
    assert [span.parent for span in tries] == [route.id] * 2 and served.parent == tries[1].id
    assert [said(span, "instance.id") for span in tries] == [first, second]
    assert [said(span, "identity.verified") for span in spans[:3]] == [True] * 3
    assert [span.attributes.get("error.type") for span in tries] == ["instance_lost", None]
    assert [name for name, _ in route.events] == ["decision", "resume"]
    assert route.events[1][1]["infermesh.instance.id"] == second == said(route, "instance.id")
    assert said(route, "attempts") == 2 and route.attributes["gen_ai.usage.output_tokens"] == 120
    assert (route.service, served.service) == ("infermesh-gateway", "infermesh-llm")
    who = served.process
    assert (who["service.instance.id"], who["hw.model"], who["infermesh.model.id"]) == (second, "A800-80G", "chat")
    assert said(served, "instance.id") == second and served.attributes["gen_ai.usage.output_tokens"] == 120
    assert served.attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert served.attributes["rpc.response.status_code"] == "OK" and not served.failed


async def test_every_request_has_a_trace_with_verified_ids_cancelled_ones_too(tmp_path: Path) -> None:
    async with collector() as sink:
        pace = (*PACE, "--otlp", sink.address)
        async with running_mesh(tmp_path, {"one": pace, "two": pace}, otlp=sink.address, http="127.0.0.1:0") as mesh:
            room = asyncio.Semaphore(64)
            draw = random.Random(7)

            async def one(number: int) -> None:
                async with room:
                    call = ask(mesh, f"question {number}", 4, id=f"r-{number}")
                    leaves = number % 4 == 0
                    try:
                        if leaves:
                            await asyncio.wait_for(_whole(call), draw.uniform(0.001, 0.06))
                        else:
                            await _whole(call)
                    except TimeoutError:
                        call.cancel()

            await asyncio.gather(*(one(number) for number in range(REQUESTS)))

            async def settled() -> bool:
                """Those who left are counted when the gateway has heard of it."""
                async with aiohttp.ClientSession() as session, session.get(f"http://{mesh.http}/metrics") as answer:
                    lines = (await answer.text()).splitlines()
                counted = sum(float(line.split()[-1]) for line in lines if line.startswith(COUNTER))
                return "infermesh_gateway_in_flight 0.0" in lines and len(sink.named("route")) == counted

            await until(settled, 30)  # a request that was counted has a trace
            for child in mesh.instances.values():  # whoever leaves sends what it has
                await asyncio.to_thread(child.end)
    routes = {str(said(span, "request.id")): span for span in sink.named("route")}
    whole = {f"r-{number}" for number in range(REQUESTS) if number % 4}
    assert len(routes) == len(sink.named("route")) and whole <= set(routes)
    cancelled = [span for span in routes.values() if span.attributes.get("error.type") == "cancelled"]
    assert len(cancelled) > 20 and {str(said(span, "request.id")) for span in cancelled}.isdisjoint(whole)
    tried = [span for span in routes.values() if said(span, "attempts")]
    assert len(tried) >= len(whole) and all(said(span, "identity.verified") is True for span in tried)
    ids = {span.id: span for span in sink.named("attempt")}
    served = sink.named("chat chat")
    assert len(served) >= len(whole)
    for span in served:
        above = ids[span.parent]
        assert span.trace == above.trace
        assert said(above, "instance.id") == said(span, "instance.id") == span.process["service.instance.id"]
    closed = {span.attributes.get("error.type") for span in served}
    assert closed <= {None, "cancelled"}, closed
    print(f"{len(routes)} traces, {len(cancelled)} of them cancelled, {len(served)} served below them")


async def _whole(call: grpc.aio.UnaryStreamCall) -> None:
    async for _ in call:
        pass
