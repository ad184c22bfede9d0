"""LanguageModelService over a real gRPC server and the scripted engine."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest

from infermesh.errors import Reason, from_rpc
from infermesh.transport import channel_options
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc
from infermesh.v1.inference_pb2 import Delivery, Hints, Relay, Resume, TokenIds
from services.chassis.arrivals import Arrivals
from services.chassis.held_prefixes import HeldPrefixes
from services.chassis.identity import Identity
from services.chassis.keys import Key, Keys
from services.chassis.server import Phase, Server
from services.llm.app import build_engine, complete
from services.llm.engine import Engine
from services.llm.service import SERVICE, LanguageModelService
from services.llm.settings import LlmSettings
from tests.kit.mesh import until

OPERATOR, CLIENT = "operator-key", "client-key"
KEYS = Keys(
    (
        Key(sha256=hashlib.sha256(OPERATOR.encode()).hexdigest(), tenant="ops", role="operator"),
        Key(sha256=hashlib.sha256(CLIENT.encode()).hexdigest(), tenant="acme", models=("chat",)),
    )
)
NOT_SENT = "\0"


@dataclass
class Running:
    stub: language_model_pb2_grpc.LanguageModelServiceAsyncStub
    address: str
    engine: Engine
    arrivals: Arrivals


@asynccontextmanager
async def running(keys: Keys = Keys(), **settings: Any) -> AsyncIterator[Running]:  # noqa: B008
    made = LlmSettings(**{"engine": "scripted", "model": "chat", "aliases": ("gpt",), **settings})
    arrivals = Arrivals()
    engine = build_engine(made, HeldPrefixes(), arrivals.room.computed)
    service = LanguageModelService(engine, Identity("llm-1", 77, "chat"), arrivals, keys, made.max_waiting)
    server = Server((SERVICE,), max_streams=256)
    language_model_pb2_grpc.add_LanguageModelServiceServicer_to_server(service, server.grpc)
    port = await server.start("127.0.0.1:0")
    service.serve(complete(made.draft("llm-1", "127.0.0.1", port, 77), await engine.start(lambda line: None)))
    await server.enter(Phase.SERVING)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
            stub = language_model_pb2_grpc.LanguageModelServiceStub(channel)
            yield Running(stub, f"127.0.0.1:{port}", engine, arrivals)
    finally:
        await server.stop(0)
        await engine.close()


def chat(model: str = "chat", text: str = "hello there", **fields: Any) -> lm.ChatRequest:
    return lm.ChatRequest(model=model, messages=[lm.Message(role=lm.ROLE_USER, content=text)], **fields)


def sampling(**fields: Any) -> lm.Sampling:
    return lm.Sampling(**fields)


async def error_of(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def test_a_chat_tells_who_answers_first_and_the_usage_last() -> None:
    async with running() as mesh:
        call = mesh.stub.Chat(chat(sampling=sampling(max_tokens=5)), metadata=(("x-request-id", "r-1"),))
        replies = [reply async for reply in call]
        meta = dict(await call.initial_metadata())
        assert meta["x-infermesh-instance-id"] == "llm-1" and meta["x-infermesh-model-id"] == "chat"
        assert meta["x-request-id"] == "r-1"
        started = replies[0].started
        assert started.id.startswith("chatcmpl-") and abs(started.created - time.time()) < 5
        assert (started.model, started.instance_id, started.incarnation, started.prompt_tokens) == (
            "chat",
            "llm-1",
            77,
            4,
        )
        assert [reply.HasField("started") for reply in replies] == [True] + [False] * (len(replies) - 1)
        assert [reply.HasField("usage") for reply in replies] == [False] * (len(replies) - 1) + [True]
        assert "".join(delta.content for reply in replies for delta in reply.deltas) == " w0 w1 w2 w3 w4"
        assert replies[-1].usage.completion_tokens == 5
        assert mesh.arrivals.room.arbiter.hears, "the engine tells the room what its steps compute"


async def test_nothing_is_sent_before_the_first_token() -> None:
    async with running(speed={"prefill_tps": 50}) as mesh:
        call = mesh.stub.Complete(lm.CompleteRequest(model="chat", text="a " * 50))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(call.initial_metadata())), 0.25)
        assert (await call.read()).HasField("started")
        call.cancel()


async def test_token_ids_travel_between_mesh_processes_or_when_asked_for() -> None:
    async with running() as mesh:
        for fields, want in (
            ({}, []),
            ({"delivery": Delivery(token_ids=True)}, [0, 1, 2]),
            ({"relay": Relay(gateway_id="g", seq=1)}, [0, 1, 2]),
        ):
            replies = [r async for r in mesh.stub.Chat(chat(sampling=sampling(max_tokens=3), **fields))]
            assert [i for r in replies for d in r.deltas for i in d.token_ids] == want


async def test_aliases_and_the_gateways_choice_of_model_are_served() -> None:
    async with running() as mesh:
        for request in (chat("gpt"), chat("whatever", relay=Relay(served_model="chat"))):
            replies = [reply async for reply in mesh.stub.Chat(request)]
            assert replies[0].started.model == "chat"
        error = from_rpc(await error_of(mesh.stub.Chat(chat("chat", relay=Relay(served_model="other")))))
        assert error.reason is Reason.MODEL_NOT_FOUND


async def test_a_resumed_stream_keeps_its_name_and_goes_on() -> None:
    async with running() as mesh:
        resume = Resume(token_ids=[0, 1, 2], response_id="chatcmpl-7", created=1234)
        replies = [
            reply async for reply in mesh.stub.Chat(chat(sampling=sampling(max_tokens=6), relay=Relay(resume=resume)))
        ]
        assert (replies[0].started.id, replies[0].started.created) == ("chatcmpl-7", 1234)
        assert "".join(d.content for r in replies for d in r.deltas) == " w3 w4 w5"
        assert replies[-1].usage.completion_tokens == 6


async def test_delivery_merges_events_without_holding_the_first() -> None:
    async with running(speed={"step_ms": 10}) as mesh:
        request = chat(sampling=sampling(max_tokens=40), delivery=Delivery(min_interval_ms=100, token_ids=True))
        began, events = time.perf_counter(), []
        async for reply in mesh.stub.Chat(request):
            events.append([i for delta in reply.deltas for i in delta.token_ids])
        took_s = time.perf_counter() - began
        assert [i for ids in events for i in ids] == list(range(40))
        assert events[0] == [0] and 3 <= len(events) <= 3 + took_s / 0.1


async def test_what_is_held_goes_out_although_the_engine_has_stalled() -> None:
    # The third token takes a second: the second must not wait for it.
    async with running(speed={"step_ms": 5, "kv_us_per_ktoken": 1}) as mesh:
        request = chat(sampling=sampling(max_tokens=3), delivery=Delivery(min_interval_ms=50))
        batch = mesh.engine._batch  # type: ignore[attr-defined]
        finish, steps = batch.finish, 0

        def stall(step: Any) -> None:
            nonlocal steps
            finish(step)
            steps += 1
            if steps == 2:
                object.__setattr__(batch._pace, "step_ms", 1000.0)

        batch.finish = stall
        began, times = time.perf_counter(), []
        async for _ in mesh.stub.Chat(request):
            times.append(time.perf_counter() - began)
        assert len(times) == 3 and times[2] > 0.9 and times[2] - times[1] > 0.4


async def test_a_hundred_clients_that_vanish_leave_nothing_behind() -> None:
    async with running(speed={"step_ms": 20}, max_running=40, max_waiting=100) as mesh:
        channels = [
            grpc.aio.insecure_channel(mesh.address, options=channel_options(client_id=number)) for number in range(10)
        ]
        stubs = [language_model_pb2_grpc.LanguageModelServiceStub(channel) for channel in channels]
        calls = []
        for number in range(100):
            delivery = Delivery(min_interval_ms=50 * (number % 2))
            calls.append(stubs[number % 10].Chat(chat(sampling=sampling(max_tokens=5000), delivery=delivery)))
        readers = [asyncio.ensure_future(call.read()) for call in calls]
        await until(lambda: mesh.arrivals.running == 100 and mesh.engine.load().steps > 10, 20)
        load = mesh.engine.load()
        assert (load.running, load.waiting, mesh.arrivals.running) == (40, 60, 100)
        await asyncio.gather(*(channel.close(grace=None) for channel in channels))
        await asyncio.wait(readers)

        def idle() -> bool:
            load = mesh.engine.load()
            return (load.running, load.waiting, mesh.arrivals.running) == (0, 0, 0)

        await until(idle, 20)  # they had 100 s to go
        assert mesh.engine.load().kv_used_ratio == 0


async def test_a_deadline_ends_the_work_in_the_engine() -> None:
    async with running(speed={"step_ms": 5}) as mesh:
        for interval in (0, 1000):
            request = chat(sampling=sampling(max_tokens=5000), delivery=Delivery(min_interval_ms=interval))
            error = from_rpc(await error_of(mesh.stub.Chat(request, timeout=0.2)))
            assert error.reason is Reason.DEADLINE_EXCEEDED
            await until(lambda: mesh.engine.load().running == 0 and mesh.arrivals.running == 0, 10)


async def test_beyond_the_batch_and_a_small_queue_it_is_full() -> None:
    async with running(speed={"step_ms": 5}, max_running=2, max_waiting=1) as mesh:
        calls = [mesh.stub.Chat(chat(sampling=sampling(max_tokens=5000))) for _ in range(3)]
        readers = [asyncio.ensure_future(call.read()) for call in calls]
        await until(lambda: (mesh.engine.load().running, mesh.engine.load().waiting) == (2, 1), 10)
        error = from_rpc(await error_of(mesh.stub.Chat(chat())))
        assert error.reason is Reason.INSTANCE_FULL and error.retry_after_s
        for call in calls:
            call.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def test_out_of_range_tells_the_exact_count() -> None:
    async with running(context=(0, 100)) as mesh:
        error = await error_of(mesh.stub.Complete(lm.CompleteRequest(model="chat", text="a" + " b" * 119)))
        assert from_rpc(error).reason is Reason.OUT_OF_RANGE and "120 tokens" in error.details()
        assert dict(error.trailing_metadata())["x-infermesh-prompt-tokens"] == "120"
        replies = [
            reply
            async for reply in mesh.stub.Complete(
                lm.CompleteRequest(model="chat", text="a", sampling=sampling(max_tokens=99))
            )
        ]
        assert replies[-1].usage.completion_tokens == 99


async def test_a_huge_max_tokens_is_cut_to_the_context() -> None:
    async with running(scripted={"max_context": 64}) as mesh:
        replies = [r async for r in mesh.stub.Chat(chat(text="hi", sampling=sampling(max_tokens=1 << 31)))]
        assert replies[-1].usage.completion_tokens == 64 - 3
        assert replies[-1].deltas[0].finish == lm.FINISH_LENGTH


async def test_keys_say_who_may_ask_and_only_gateways_relay() -> None:
    async with running(keys=KEYS) as mesh:

        async def ask(key: str, request: lm.ChatRequest) -> Reason | None:
            meta = () if key == NOT_SENT else (("authorization", f"Bearer {key}"),)
            try:
                async for _ in mesh.stub.Chat(request, metadata=meta):
                    pass
            except grpc.RpcError as error:
                return from_rpc(error).reason
            return None

        relayed = chat(relay=Relay(gateway_id="g", served_model="chat"))
        assert await ask(NOT_SENT, chat()) is Reason.UNAUTHENTICATED
        assert await ask(NOT_SENT, relayed) is Reason.UNAUTHENTICATED
        assert await ask("wrong", chat()) is Reason.UNAUTHENTICATED
        assert await ask(CLIENT, chat()) is None
        assert await ask(CLIENT, chat("gpt")) is Reason.PERMISSION_DENIED
        assert await ask(CLIENT, relayed) is Reason.INVALID_ARGUMENT
        assert await ask(OPERATOR, relayed) is None


BAD_CHATS = [
    (lm.ChatRequest(model="chat"), Reason.INVALID_ARGUMENT, "messages"),
    (chat("nobody"), Reason.MODEL_NOT_FOUND, "model"),
    (chat(""), Reason.MODEL_NOT_FOUND, "model"),
    (lm.ChatRequest(model="chat", messages=[lm.Message(content="x")]), Reason.INVALID_ARGUMENT, "messages[0].role"),
    (chat(text="a " * 40_000), Reason.CONTEXT_LENGTH_EXCEEDED, "messages"),
    (chat(sampling=sampling(max_tokens=-1)), Reason.INVALID_ARGUMENT, "sampling.max_tokens"),
    (chat(sampling=sampling(max_tokens=0)), Reason.INVALID_ARGUMENT, "sampling.max_tokens"),
    (chat(sampling=sampling(max_tokens=(1 << 63) - 1)), Reason.INVALID_ARGUMENT, "sampling.max_tokens"),
    (chat(sampling=sampling(n=16384)), Reason.INVALID_ARGUMENT, "sampling.n"),
    (chat(sampling=sampling(n=0)), Reason.INVALID_ARGUMENT, "sampling.n"),
    (chat(sampling=sampling(temperature=math.nan)), Reason.INVALID_ARGUMENT, "sampling.temperature"),
    (chat(sampling=sampling(top_p=math.inf)), Reason.INVALID_ARGUMENT, "sampling.top_p"),
    (chat(sampling=sampling(stop=[""])), Reason.INVALID_ARGUMENT, "sampling.stop[0]"),
    (chat(sampling=sampling(stop=["x"] * 17)), Reason.INVALID_ARGUMENT, "sampling.stop"),
    (chat(sampling=sampling(min_tokens=9, max_tokens=8)), Reason.INVALID_ARGUMENT, "sampling.min_tokens"),
    (chat(sampling=sampling(logit_bias={1: math.nan})), Reason.INVALID_ARGUMENT, "sampling.logit_bias[1]"),
    (chat(tools=[lm.Tool(name="f")]), Reason.UNSUPPORTED, "tools"),
    (chat(tools=[lm.Tool(name="f", parameters_json="[" * 100_000)]), Reason.INVALID_ARGUMENT, "tools[0].parameters"),
    (chat(constraint=lm.Constraint(json_schema="{}")), Reason.UNSUPPORTED, "constraint.json_schema"),
    (chat(constraint=lm.Constraint(json_schema="{")), Reason.INVALID_ARGUMENT, "constraint.json_schema"),
    (chat(lora="adapter"), Reason.UNSUPPORTED, "lora"),
    (chat(template_args_json='{"a": 1}'), Reason.UNSUPPORTED, "template_args_json"),
    (chat(template_args_json="[]"), Reason.INVALID_ARGUMENT, "template_args_json"),
    (chat(hints=Hints(session_id="s" * 257)), Reason.INVALID_ARGUMENT, "hints.session_id"),
    (chat(delivery=Delivery(min_interval_ms=20_000)), Reason.INVALID_ARGUMENT, "delivery.min_interval_ms"),
    (chat(relay=Relay(cache_salt=b"x" * 65)), Reason.INVALID_ARGUMENT, "relay.cache_salt"),
    (
        chat(relay=Relay(resume=Resume(token_ids=[0])), sampling=sampling(n=2)),
        Reason.INVALID_ARGUMENT,
        "relay.resume",
    ),
]
BAD_COMPLETIONS = [
    (lm.CompleteRequest(model="chat"), Reason.INVALID_ARGUMENT, "prompt"),
    (lm.CompleteRequest(model="chat", text=""), Reason.INVALID_ARGUMENT, "prompt"),
    (lm.CompleteRequest(model="chat", token_ids=TokenIds()), Reason.INVALID_ARGUMENT, "prompt"),
    (lm.CompleteRequest(model="chat", text="x", suffix="y"), Reason.UNSUPPORTED, "suffix"),
    (
        lm.CompleteRequest(model="chat", token_ids=TokenIds(ids=[1] * 40_000)),
        Reason.CONTEXT_LENGTH_EXCEEDED,
        "messages",
    ),
]


async def test_bad_input_gets_a_typed_error_each_and_leaves_nothing() -> None:
    async with running() as mesh:
        for method, table in ((mesh.stub.Chat, BAD_CHATS), (mesh.stub.Complete, BAD_COMPLETIONS)):
            for request, reason, param in table:
                error = from_rpc(await error_of(method(request, timeout=10)))
                assert (error.reason, error.param) == (reason, param), str(request)[:200]
                assert error.message
        assert mesh.engine.load().running == mesh.arrivals.running == 0
        replies = [reply async for reply in mesh.stub.Chat(chat())]
        assert replies[-1].usage.completion_tokens == 64


async def test_a_message_that_is_too_large_or_no_message_at_all_is_refused() -> None:
    async with running() as mesh:
        error = await error_of(mesh.stub.Chat(chat(text="a" * (9 << 20)), timeout=10))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with grpc.aio.insecure_channel(mesh.address, options=channel_options()) as channel:
            raw = channel.unary_stream("/infermesh.v1.LanguageModelService/Chat")
            error = await error_of(raw(b"\xff\xff\xff not protobuf", timeout=10))
            assert (
                from_rpc(error).reason is Reason.INVALID_ARGUMENT
                and dict(error.trailing_metadata())["x-infermesh-reason"]
            )


async def test_a_broken_engine_is_told_as_such() -> None:
    async with running(scripted={"fail_after_tokens": 2}, speed={"step_ms": 1}) as mesh:
        error = from_rpc(await error_of(mesh.stub.Chat(chat())))
        assert error.reason is Reason.ENGINE_FAILED
        assert mesh.arrivals.running == 0


async def test_tokenize_and_detokenize() -> None:
    async with running() as mesh:
        reply = await mesh.stub.Tokenize(lm.TokenizeRequest(model="gpt", text="one w2 three"))
        assert (reply.model, reply.max_context, list(reply.tokens)) == ("chat", 32768, ["one", " w2", " three"])
        text = await mesh.stub.Detokenize(lm.DetokenizeRequest(model="chat", token_ids=reply.token_ids))
        assert text.text == "one w2 three" and text.model == "chat"
        for call, param in (
            (mesh.stub.Tokenize(lm.TokenizeRequest(model="chat")), "input"),
            (mesh.stub.Tokenize(lm.TokenizeRequest(model="x", text="a")), "model"),
            (mesh.stub.Tokenize(lm.TokenizeRequest(model="chat", chat=lm.Conversation())), "messages"),
            (mesh.stub.Detokenize(lm.DetokenizeRequest(model="chat", token_ids=[1 << 31])), "token_ids"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                await call
            assert from_rpc(caught.value).param == param
