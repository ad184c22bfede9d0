"""The forwarder against real gRPC servers that misbehave as told."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import embedding_pb2_grpc as em_grpc
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import worker_pb2_grpc
from registry.port import Entry, Snapshot
from services.chassis.keys import Keys
from services.gateway.config import Limits
from services.gateway.front import rpc
from services.gateway.front.answer import Answer
from services.gateway.front.embed_stream import EmbedStream
from services.gateway.upstream.calls import Call, Caller, Method
from tests.kit.fake_instance import FakeInstance, fake_instance
from tests.kit.mesh import until
from tests.kit.upstream import REQUEST_ID, breaks_after_two, refusing, request, silent, upstream


async def test_the_instance_sees_what_a_gateway_adds() -> None:
    async with fake_instance("a") as a, upstream(a) as up:
        text, identity = await up.chat(caller=Caller(tenant="acme"))
        assert text == " w0 w1 w2"
        assert (identity.instance_id, identity.model_id, identity.attempts) == ("a", "m", 1)
        relay = a.requests[0].relay
        assert (relay.gateway_id, relay.seq, relay.attempt, relay.tenant) == ("gw-test", 1, 1, "acme")
        assert len(relay.cache_salt) == 16 and relay.rendered_at % 86_400 == 0 and relay.rendered_at > 0
        await up.chat(caller=Caller(tenant="other"))
        assert a.requests[1].relay.cache_salt != relay.cache_salt and a.requests[1].relay.seq == 2
        assert up.nothing_left()


@pytest.mark.parametrize("reason", [Reason.ENGINE_FAILED, Reason.DRAINING, Reason.STARTING, Reason.OUT_OF_RANGE])
async def test_another_instance_answers_when_one_refuses_or_fails(reason: Reason) -> None:
    async with fake_instance("a", refusing(reason)) as a, fake_instance("b") as b, upstream(a, b) as up:
        for _ in range(4):
            text, identity = await up.chat()
            assert text == " w0 w1 w2" and identity.instance_id == "b"
        assert up.nothing_left()


async def test_a_callers_own_error_is_not_retried() -> None:
    async with fake_instance("a", refusing(Reason.INVALID_ARGUMENT, "bad field")) as a, fake_instance("b") as b:
        async with upstream(a, b) as up:
            b.chat = a.chat
            with pytest.raises(MeshError, match="bad field") as caught:
                await up.chat()
            assert caught.value.reason is Reason.INVALID_ARGUMENT
            assert len(a.requests) + len(b.requests) == 1


async def test_when_all_fail_attempts_are_bounded_and_the_last_error_is_told() -> None:
    async with fake_instance("a", refusing(Reason.ENGINE_FAILED)) as a, fake_instance("b", a.chat) as b:
        async with fake_instance("c", a.chat) as c, fake_instance("d", a.chat) as d, upstream(a, b, c, d) as up:
            with pytest.raises(MeshError) as caught:
                await up.chat()
            assert caught.value.reason is Reason.ENGINE_FAILED
            assert sum(len(x.requests) for x in (a, b, c, d)) == 2, "what breaks two engines is not shown to a third"
            await asyncio.gather(*(up.chat() for _ in range(100)), return_exceptions=True)
            sent = sum(len(x.requests) for x in (a, b, c, d)) - 2
            assert sent <= 100 * 1.2, sent  # at most 20 retries at a time
            assert up.nothing_left()


async def test_out_of_range_corrects_the_count_or_tells_the_caller() -> None:
    async with fake_instance("a", refusing(Reason.OUT_OF_RANGE, "the prompt has 4242 tokens")) as a, upstream(a) as up:
        with pytest.raises(MeshError, match="4242") as caught:
            await up.chat()
        assert caught.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED


async def test_a_full_instance_is_waited_for_not_failed() -> None:
    async with fake_instance("a", refusing(Reason.INSTANCE_FULL, times=3)) as a, upstream(a) as up:
        text, _ = await up.chat()
        assert text == " w0 w1 w2" and len(a.requests) == 4 and up.state("a") == "healthy"


async def test_a_stream_that_breaks_says_how_far_it_got() -> None:
    async with fake_instance("a", breaks_after_two) as a, fake_instance("b", breaks_after_two) as b:
        async with upstream(a, b) as up:
            with pytest.raises(MeshError, match="lost after 2 tokens: the engine died") as caught:
                await up.chat()
            assert caught.value.reason is Reason.STREAM_LOST
            assert len(a.requests) + len(b.requests) == 1
            assert up.nothing_left()


async def test_the_deadline_is_passed_on_and_ends_it() -> None:
    async with fake_instance("a", silent) as a, upstream(a) as up:
        with pytest.raises(MeshError) as caught:
            await up.chat(deadline_s=0.5)  # on a busy machine it takes a while until the instance has the request
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        await until(lambda: a.cancelled == 1, 20)
        assert up.nothing_left() and up.state("a") == "healthy"


async def test_cancellation_reaches_the_instance_at_once_and_frees_everything() -> None:
    async with fake_instance("a", silent, max_running=50) as a, upstream(a) as up:
        tasks = [asyncio.create_task(up.chat()) for _ in range(80)]
        await until(lambda: len(a.requests) == 50 and up.carrier.router.waiting == 30, 20)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks) and up.nothing_left()
        await until(lambda: a.cancelled == len(a.requests), 20)


async def test_leaving_a_stream_early_cancels_it() -> None:
    async def endless(self: FakeInstance, request: Any, context: Any) -> None:
        await self.begin(context)
        while True:
            await context.write(lm.ChatResponse(deltas=[lm.Delta(token_ids=[1])]))
            await asyncio.sleep(0.005)

    async with fake_instance("a", endless) as a, upstream(a) as up:
        async with up.forwarder.open(Method.CHAT, request(), Call(REQUEST_ID)) as reply:
            async for _ in reply:
                break
        assert up.nothing_left()
        await until(lambda: a.cancelled == 1, 20)


async def test_somebody_else_at_the_address_is_not_believed() -> None:
    async with fake_instance("a", answers_as="evil") as a, fake_instance("b") as b, upstream(a, b) as up:
        for _ in range(5):
            _, identity = await up.chat()
            assert identity.instance_id == "b"
    async with fake_instance("a", hello_id="evil") as a, upstream(a) as up:
        await until(lambda: up.directory.instances()[0].state == "rejected", 20)
        assert "answered by evil" in up.directory.instances()[0].rejected_reason
        with pytest.raises(MeshError) as caught:
            await up.chat()
        assert caught.value.reason is Reason.NO_INSTANCE


async def test_a_re_sync_keeps_channel_and_link() -> None:
    async with fake_instance("a") as a, upstream(a) as up:
        line = up.carrier.channels.open(a.endpoint)
        for _ in range(3):
            up.directory.apply(Snapshot((Entry(a.endpoint),)))
        await asyncio.sleep(0.05)
        assert up.carrier.channels.open(a.endpoint) is line and a.links == 1
        up.directory.apply(Snapshot(stale=True))
        assert up.directory.stale and (await up.chat())[0] == " w0 w1 w2"


async def test_a_link_that_breaks_is_made_again() -> None:
    async with fake_instance("a") as a, upstream(a) as up:
        await a.server.stop(0)
        await until(lambda: up.state("a") == "lost", 20)
        again = grpc.aio.server()
        again.add_insecure_port(a.endpoint.address)
        a.server = again
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(a, again)
        await again.start()
        await until(lambda: up.state("a") == "healthy", 20)


async def test_embed_stream_keeps_order_inherits_and_is_bounded() -> None:
    async with fake_instance("e", kind="embedding") as e, upstream(e) as up:
        server = grpc.aio.server()
        door = rpc.Door(up.forwarder, Keys(), up.carrier._observe)
        server.add_generic_rpc_handlers(rpc.handlers(door, EmbedStream(door), Answer(door, up.directory)))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = em_grpc.EmbeddingServiceStub(channel)
            call = stub.EmbedStream()
            first = em.EmbedRequest(model="m", texts=["slow 0"], normalize=True, task="query", dimensions=8)
            await call.write(em.EmbedStreamRequest(batch=first, tag=100))
            for i in range(1, 40):
                name = f"slow {i}" if i % 3 == 0 else f"text {i}"
                more = {"prefix": "p: "} if i == 5 else {}
                await call.write(em.EmbedStreamRequest(batch=em.EmbedRequest(texts=[name] * i, **more), tag=100 + i))
            await asyncio.sleep(0.05)
            assert len(e.requests) <= 16  # eight in flight at a time, whatever was written
            await call.done_writing()
            tags = []
            async for reply in call:
                tags.append(reply.tag)
                i = reply.tag - 100
                texts = {vector.packed.decode().split()[1] for vector in reply.batch.vectors}
                assert texts == {str(i)} and len(reply.batch.vectors) == max(1, i)
            assert tags == list(range(100, 140))
            assert dict(await call.initial_metadata())["x-infermesh-instance-id"] == "e"
            by_length = {len(r.texts): r for r in e.requests}
            assert all(r.normalize and r.dimensions == 8 and r.model == "m" for r in e.requests)
            assert by_length[7].task == "query" and (by_length[5].task, by_length[5].prefix) == ("", "p: ")
            bad = stub.EmbedStream()
            await bad.write(em.EmbedStreamRequest(batch=em.EmbedRequest(model="m", texts=["fine"]), tag=1))
            await bad.write(em.EmbedStreamRequest(batch=em.EmbedRequest(texts=[""]), tag=2))
            await bad.done_writing()
            got = []
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for reply in bad:
                    got.append(reply.tag)
            assert got == [1] and caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await server.stop(0)
        assert up.nothing_left()


async def test_metrics_count_what_happened() -> None:
    async with fake_instance("a") as a, upstream(a) as up:
        await up.chat()
        with pytest.raises(MeshError):
            async with up.forwarder.open(Method.CHAT, lm.ChatRequest(model="x" * 300), Call(REQUEST_ID)):
                pass
        text = up.carrier._observe.exposition()[0].decode()
        ok = 'infermesh_gateway_requests_total{instance="a",method="chat",model="m",outcome="ok"} 1.0'
        bad = 'infermesh_gateway_requests_total{instance="",method="chat",model="",outcome="invalid_argument"} 1.0'
        assert ok in text and bad in text
        assert 'infermesh_gateway_ttft_seconds_count{instance="a",method="chat",model="m"} 1.0' in text
        assert 'infermesh_gateway_tokens_total{model="m",type="completion"} 3.0' in text
        assert "infermesh_gateway_in_flight 0.0" in text


async def test_a_tenants_quota_pays_for_what_was_used() -> None:
    acme = Caller(tenant="acme", tokens_per_minute=1_000_000)
    async with fake_instance("a") as a, upstream(a) as up:

        def spent() -> float:
            return 1_000_000 - up.forwarder.quota._buckets["acme"].tokens

        await up.chat(caller=acme)
        assert spent() == 8, "the usage, not the estimate of prompt and answer"
        a.chat = refusing(Reason.INVALID_ARGUMENT)
        with pytest.raises(MeshError):
            await up.chat(caller=acme)
        assert spent() <= 8, "a refusal is free"
        a.chat = silent
        task = asyncio.create_task(up.chat(caller=acme))
        await until(lambda: len(a.requests) == 3, 20)
        assert spent() > 8, "reserved while it runs"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert spent() <= 8, "nothing came"


async def test_a_gateway_takes_so_many_requests_at_once() -> None:
    async with fake_instance("a", silent) as a, upstream(a) as up:
        up.forwarder.limits = Limits(max_concurrent=2)
        held = [asyncio.create_task(up.chat()) for _ in range(2)]
        await until(lambda: len(a.requests) == 2, 20)
        with pytest.raises(MeshError) as caught:
            await up.chat()
        assert caught.value.reason is Reason.QUEUE_FULL and caught.value.retry_after_s
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert up.nothing_left()


async def test_the_exact_count_of_an_instance_decides_the_next_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refusing(Reason.OUT_OF_RANGE, "the prompt has 5000 tokens, at most 4096 are served here")
    async with fake_instance("a", refused) as a, fake_instance("b", refused) as b, upstream(a, b) as up:
        router, seen = up.carrier.router, []
        pick = router.pick
        monkeypatch.setattr(router, "pick", lambda facts, now, draw: seen.append(facts) or pick(facts, now, draw))
        with pytest.raises(MeshError) as caught:
            await up.chat()
        assert caught.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED and "5000" in caught.value.message
        assert [(f.counted, f.prompt_tokens, len(f.excluded)) for f in seen] == [
            (False, 0, 0),
            (True, 5000, 1),
            (True, 5000, 2),
        ]


async def test_the_report_tells_every_attempt_in_order() -> None:
    reports: list[Any] = []
    async with fake_instance("a", refusing(Reason.ENGINE_FAILED)) as a, fake_instance("b") as b, upstream(a, b) as up:
        up.forwarder.observe.listeners.append(reports.append)
        while not any(report.attempts == 2 for report in reports):
            await up.chat()
        found = next(report for report in reports if report.attempts == 2)
        assert [(t.record.chosen, t.outcome) for t in found.tried] == [("a", "engine_failed"), ("b", "ok")]
        assert found.record is found.tried[-1].record and ("a", "excluded") in found.record.rejected
        assert (found.facts.model, found.facts.excluded) == ("m", {"a"})
    reports.clear()
    async with upstream() as up:
        up.forwarder.observe.listeners.append(reports.append)
        for bad in (lm.ChatRequest(), request()):
            with pytest.raises(MeshError):
                async with up.forwarder.open(Method.CHAT, bad, Call(REQUEST_ID)):
                    pass
        assert [(r.facts is None, [t.outcome for t in r.tried]) for r in reports] == [
            (True, []),
            (False, [reports[1].outcome]),
        ]


async def test_a_fault_of_ours_at_the_end_of_a_request_does_not_keep_it_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a tenant")

    async with fake_instance("a") as a, upstream(a) as up:
        monkeypatch.setattr(up.carrier.router, "release", broken)
        with pytest.raises(KeyError):
            await up.chat()
        assert up.forwarder.budget.live == 0 and up.forwarder.idle.is_set()
