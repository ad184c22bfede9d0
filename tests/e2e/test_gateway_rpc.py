"""The gateway's gRPC door over real processes: scripted instances, embedded registry, one gateway."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from infermesh.errors import Reason, from_rpc
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import embedding_pb2_grpc as em_grpc
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1 import retrieve_pb2, retrieve_pb2_grpc, worker_pb2_grpc
from infermesh.v1.inference_pb2 import Delivery, Hints, Relay
from infermesh.v1.worker_pb2 import DescribeRequest, GatewayHello, LinkRequest
from tests.kit.children import ROOT
from tests.kit.mesh import TestMesh, running_mesh, until

FAST = ("--prefill-tps", "1e6", "--step-ms", "1")
STEADY = ("--prefill-tps", "1e6", "--step-ms", "20")


def chat(text: str = "hello there", model: str = "chat", max_tokens: int = 8, **more: Any) -> lm.ChatRequest:
    message = lm.Message(role=lm.ROLE_USER, content=text)
    return lm.ChatRequest(
        model=model, messages=[message], sampling=lm.Sampling(max_tokens=max_tokens, temperature=0), **more
    )


async def answer(call: Any) -> tuple[str, list[Any]]:
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return "".join(delta.content for event in events for delta in event.deltas), events


async def failure(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return from_rpc(caught.value)


async def in_flight(mesh: TestMesh) -> int:
    listed = await mesh.mesh.ListInstances(ms.ListInstancesRequest())
    return sum(instance.in_flight for instance in listed.instances)


async def engine_load(mesh: TestMesh, id: str) -> tuple[int, int]:
    stub = worker_pb2_grpc.WorkerServiceStub(await mesh.dial(mesh.instances[id].address))
    load = (await stub.Describe(DescribeRequest())).load  # type: ignore[misc]
    return load.running, load.waiting


async def test_forwarding_equals_direct_and_names_the_instance(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": (*FAST, "--alias", "nick")}) as mesh:
        direct = await mesh.direct("a")
        request = chat(max_tokens=20, delivery=Delivery(token_ids=True))
        want, want_events = await answer(direct.Chat(request))
        call = mesh.llm.Chat(request, metadata=(("x-request-id", "mine-1"),))
        got, got_events = await answer(call)
        assert got == want and got.startswith(" w0 w1")

        def tokens(events: list[Any]) -> list[int]:
            return [token for event in events for delta in event.deltas for token in delta.token_ids]

        assert tokens(got_events) == tokens(want_events) and len(tokens(got_events)) == 20
        assert got_events[-1].usage == want_events[-1].usage
        assert got_events[0].started.instance_id == "a"
        meta = dict(await call.initial_metadata())
        assert (meta["x-infermesh-instance-id"], meta["x-infermesh-model-id"]) == ("a", "chat")
        assert (meta["x-infermesh-attempts"], meta["x-request-id"]) == ("1", "mine-1")
        prompt = lm.CompleteRequest(model="nick", text="one two", sampling=lm.Sampling(max_tokens=4, temperature=0))
        completed, events = await answer(mesh.llm.Complete(prompt))
        prompt.model = "chat"
        assert completed == (await answer(direct.Complete(prompt)))[0]
        assert events[0].started.model == "chat"
        ids = lm.TokenizeRequest(model="chat", text="one two three")
        assert (await mesh.llm.Tokenize(ids)).token_ids == (await direct.Tokenize(ids)).token_ids
        back = lm.DetokenizeRequest(model="chat", token_ids=(await mesh.llm.Tokenize(ids)).token_ids)
        assert (await mesh.llm.Detokenize(back)).text == (await direct.Detokenize(back)).text
        assert await in_flight(mesh) == 0


async def test_refusals_are_typed_and_name_the_field(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": FAST}) as mesh:
        await asyncio.sleep(3)  # a young gateway lets unknown models wait
        llm = mesh.llm
        table: list[tuple[Any, Reason, str | None]] = [
            (llm.Chat(chat(model="nope")), Reason.MODEL_NOT_FOUND, "model"),
            (llm.Chat(chat(model="")), Reason.INVALID_ARGUMENT, "model"),
            (llm.Chat(lm.ChatRequest(model="chat")), Reason.INVALID_ARGUMENT, "messages"),
            (llm.Chat(chat(relay=Relay(seq=1))), Reason.INVALID_ARGUMENT, "relay"),
            (llm.Chat(chat(max_tokens=-1)), Reason.INVALID_ARGUMENT, "sampling.max_tokens"),
            (llm.Chat(chat(max_tokens=2**62)), Reason.INVALID_ARGUMENT, "sampling.max_tokens"),
            (llm.Chat(chat(hints=Hints(priority=101))), Reason.INVALID_ARGUMENT, "hints.priority"),
            (llm.Chat(chat(lora="x")), Reason.UNSUPPORTED, "lora"),
            (llm.Complete(lm.CompleteRequest(model="chat")), Reason.INVALID_ARGUMENT, "prompt"),
            (llm.Tokenize(lm.TokenizeRequest(model="chat")), Reason.INVALID_ARGUMENT, "input"),
            (llm.Chat(chat(text="word " * 300_000)), Reason.CONTEXT_LENGTH_EXCEEDED, None),
        ]
        for call, reason, param in table:
            error = await failure(call)
            assert error.reason is reason, error
            assert param is None or error.param == param
        garbage = mesh.channel.unary_stream("/infermesh.v1.LanguageModelService/Chat")
        error = await failure(garbage(b"\xff\xff\xff\xff"))
        assert (error.reason, error.param) == (Reason.INVALID_ARGUMENT, "request")
        too_large = await failure(llm.Chat(chat(text="x" * (9 << 20))))
        assert too_large.row.grpc is grpc.StatusCode.RESOURCE_EXHAUSTED
        answer_stub = retrieve_pb2_grpc.RetrieveServiceStub(mesh.channel)
        error = await failure(answer_stub.Answer(retrieve_pb2.AnswerRequest()))
        assert (error.reason, error.param) == (Reason.INVALID_ARGUMENT, "question")
        for call, param in (
            (mesh.mesh.Pick(ms.PickRequest()), "model"),
            (mesh.mesh.Report(ms.ReportRequest()), "outcome"),
        ):
            error = await failure(call)
            assert (error.reason, error.param) == (Reason.INVALID_ARGUMENT, param)
        assert (await answer(llm.Chat(chat())))[0] == " w0 w1 w2 w3 w4 w5 w6 w7"
        assert await in_flight(mesh) == 0


async def test_killed_before_the_first_token_nobody_notices_and_it_is_gone(tmp_path: Path) -> None:
    slow = ("--prefill-tps", "20", "--step-ms", "1")  # seconds of prefill: killed while nothing was sent
    async with running_mesh(tmp_path, {"a": slow, "b": slow}) as mesh:
        for instance in ("a", "b"):
            assert (await mesh.states())[instance] == "healthy"
        calls = [asyncio.create_task(answer(mesh.llm.Chat(chat(f"number {i} of ten")))) for i in range(6)]

        async def there() -> bool:
            return sum(await engine_load(mesh, "a")) > 0

        await until(there, 20)
        mesh.instances["a"].kill()
        killed = time.monotonic()

        async def gone() -> bool:
            return "a" not in await mesh.states()

        await until(gone, 20)
        assert time.monotonic() - killed < 2.9, "as long as a registry only suspects it"
        done = await asyncio.gather(*calls)
        assert {text for text, _ in done} == {" w0 w1 w2 w3 w4 w5 w6 w7"}
        assert {events[0].started.instance_id for _, events in done} == {"b"}
        assert await in_flight(mesh) == 0


async def test_killed_mid_stream_says_how_far_it_got(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": STEADY}) as mesh:
        call = mesh.llm.Chat(chat(max_tokens=400))
        tokens = 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for event in call:
                tokens += sum(len(delta.token_ids) for delta in event.deltas)
                if tokens >= 10:
                    mesh.instances["a"].kill()
        error = from_rpc(caught.value)
        assert error.reason is Reason.STREAM_LOST
        assert int(re.search(r"after (\d+) tokens", error.message)[1]) == tokens >= 10  # type: ignore[index]


async def test_deadline_and_cancellation_reach_the_engine(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": ("--prefill-tps", "1e6", "--step-ms", "30")}) as mesh:
        begun = time.monotonic()
        error = await failure(mesh.llm.Chat(chat(max_tokens=1000), timeout=0.4))
        assert error.reason is Reason.DEADLINE_EXCEEDED and 0.3 < time.monotonic() - begun < 10

        async def idle() -> bool:
            return await engine_load(mesh, "a") == (0, 0) and await in_flight(mesh) == 0

        await until(idle, 10)  # it had 30 s to go

        async def vanish(wait_s: float) -> None:
            call = mesh.llm.Chat(chat(max_tokens=1000))
            await call.read()
            await asyncio.sleep(wait_s)
            call.cancel()

        await asyncio.gather(*(vanish(i / 400) for i in range(100)))
        await until(idle, 10)


async def test_a_full_instance_makes_wait_and_the_queue_is_bounded(tmp_path: Path) -> None:
    one = ("--prefill-tps", "1e6", "--step-ms", "10", "--max-running", "1")
    bounds = {"max_requests": 2, "max_wait_s": 20}
    async with running_mesh(tmp_path, {"a": one}, queue=bounds) as mesh:
        first = mesh.llm.Chat(chat(max_tokens=2000))
        await first.read()
        waiting = [asyncio.create_task(answer(mesh.llm.Chat(chat()))) for _ in range(2)]
        await asyncio.sleep(0.2)
        error = await failure(mesh.llm.Chat(chat()))
        assert error.reason is Reason.QUEUE_FULL and error.retry_after_s > 0
        assert (await mesh.llm.Tokenize(lm.TokenizeRequest(model="chat", text="free of slots"))).token_ids
        first.cancel()
        assert [text for text, _ in await asyncio.gather(*waiting)] == [" w0 w1 w2 w3 w4 w5 w6 w7"] * 2
        assert await in_flight(mesh) == 0
    async with running_mesh(tmp_path / "..", {"b": one}, queue={"max_wait_s": 0.3}) as mesh:
        first = mesh.llm.Chat(chat(max_tokens=2000))
        await first.read()
        error = await failure(mesh.llm.Chat(chat()))
        assert error.reason is Reason.QUEUE_TIMEOUT and error.retry_after_s > 0
        first.cancel()


async def test_load_spreads_by_declared_speed(tmp_path: Path) -> None:
    quick = ("--prefill-tps", "30000", "--step-ms", "5", "--max-running", "64")
    slow = ("--prefill-tps", "10000", "--step-ms", "15", "--max-running", "64")
    async with running_mesh(tmp_path, {"quick": quick, "slow": slow}) as mesh:
        calls = [answer(mesh.llm.Chat(chat(f"burst {i} " + "word " * 800, max_tokens=20))) for i in range(60)]
        got = Counter(events[0].started.instance_id for _, events in await asyncio.gather(*calls))
        assert 40 <= got["quick"] <= 52, got  # 45 : 15, but for reports and ends that arrive meanwhile


async def test_out_of_range_corrects_the_count_and_goes_elsewhere(tmp_path: Path) -> None:
    narrow = (*FAST, "--prefill-tps", "1e6", "--context", "0-64", "--max-context", "4096")
    wide = ("--prefill-tps", "100000", "--step-ms", "1", "--max-context", "4096")
    async with running_mesh(tmp_path, {"narrow": narrow, "wide": wide}) as mesh:
        # 120 one-letter words are 240 bytes, about 60 tokens by the prior; the engine counts twice as many.
        call = mesh.llm.Chat(chat("a " * 90, max_tokens=4))
        text, events = await answer(call)
        assert text == " w0 w1 w2 w3" and events[0].started.instance_id == "wide"
        short = mesh.llm.Chat(chat("a", max_tokens=4))
        assert (await answer(short))[1][0].started.instance_id == "narrow"


async def test_list_watch_explain_and_drain(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": (*STEADY, "--device", "A800-80G"), "b": ("--step-ms", "30")}) as mesh:
        listed = await mesh.mesh.ListInstances(ms.ListInstancesRequest())
        assert [(i.id, i.kind, i.model, i.state) for i in listed.instances] == [
            ("a", "llm", "chat", "healthy"),
            ("b", "llm", "chat", "healthy"),
        ]
        assert listed.instances[0].metadata["device"] == "A800-80G" and not listed.registry_stale
        assert listed.instances[0].load.running == 0
        explained = await mesh.mesh.Explain(
            ms.ExplainRequest(kind="llm", model="chat", prompt_tokens=10, max_tokens=10)
        )
        record = json.loads(explained.decision_json)
        assert record["chosen"] == "a" and {c["id"] for c in record["candidates"]} == {"a", "b"}
        assert (await failure(mesh.mesh.Explain(ms.ExplainRequest(request_id="x")))).reason is Reason.NOT_FOUND
        watch = mesh.mesh.WatchInstances(ms.WatchInstancesRequest())
        assert len((await watch.read()).instances) == 2
        running = asyncio.create_task(answer(mesh.llm.Chat(chat(max_tokens=150))))

        async def begun() -> bool:  # there, by its own count: what is still on its way would go to the other
            return any([(await engine_load(mesh, id))[0] for id in ("a", "b")])

        await until(begun, 20)
        busy = next(i for i in (await mesh.mesh.ListInstances(ms.ListInstancesRequest())).instances if i.in_flight).id
        link = worker_pb2_grpc.WorkerServiceStub(await mesh.dial(mesh.instances[busy].address)).Link()
        await link.write(LinkRequest(hello=GatewayHello(gateway_id="another")))
        drained = await mesh.mesh.DrainInstance(ms.DrainInstanceRequest(instance_id=busy, reason="test"))
        assert drained.running == 1

        async def leaving() -> bool:
            return (await mesh.states()).get(busy) in ("draining", None)

        await until(leaving, 20)
        other = {"a": "b", "b": "a"}[busy]
        _, events = await answer(mesh.llm.Chat(chat()))
        assert events[0].started.instance_id == other
        text, events = await running
        assert len(text.split()) == 150 and events[0].started.instance_id == busy
        frames = [frame.WhichOneof("frame") async for frame in link]
        assert frames[0] == "hello" and frames.count("draining") == 1 and frames[-1] == "goodbye"

        async def gone() -> bool:
            return list(await mesh.states()) == [other]

        await until(gone, 20)
        assert await asyncio.to_thread(mesh.instances[busy].popen.wait, 20) == 0
        while len((await watch.read()).instances) != 1:
            pass
        watch.cancel()
        nobody = await failure(mesh.mesh.DrainInstance(ms.DrainInstanceRequest(instance_id="nobody")))
        assert nobody.reason is Reason.NOT_FOUND


async def test_keys_tenants_models_and_tokens_a_minute(tmp_path: Path) -> None:
    def line(secret: str, more: str) -> str:
        return f"  - {{sha256: {hashlib.sha256(secret.encode()).hexdigest()}, {more}}}"

    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "\n".join(
            [
                "version: 1",
                "keys:",
                line("alice", "tenant: acme, models: [chat], tokens_per_minute: 100"),
                line("bob", "tenant: other, models: [elsewhere]"),
                line("root", "tenant: ops, role: operator"),
            ]
        )
    )
    async with running_mesh(tmp_path, {}, keys=keys) as mesh:

        def who(secret: str) -> tuple[tuple[str, str], ...]:
            return (("authorization", f"Bearer {secret}"),)

        await mesh.start("a", *FAST)

        async def there() -> bool:
            listed = await mesh.mesh.ListInstances(ms.ListInstancesRequest(), metadata=who("root"))
            return [i.state for i in listed.instances] == ["healthy"]

        await until(there, 20)
        for secret, seen in (("alice", 1), ("bob", 0)):
            listed = await mesh.mesh.ListInstances(ms.ListInstancesRequest(), metadata=who(secret))
            kind = ms.ListInstancesRequest(kind="lmm")  # none of them, and not nobody
            wrong = await failure(mesh.mesh.ListInstances(kind, metadata=who(secret)))
            assert (wrong.reason, wrong.param) == (Reason.INVALID_ARGUMENT, "kind")
            watched = await mesh.mesh.WatchInstances(ms.WatchInstancesRequest(), metadata=who(secret)).read()
            assert len(listed.instances) == len(watched.instances) == seen, secret
        explain = ms.ExplainRequest(kind="llm", model="chat")
        assert (await failure(mesh.mesh.Explain(explain, metadata=who("bob")))).reason is Reason.PERMISSION_DENIED
        await mesh.mesh.Explain(explain, metadata=who("alice"))
        assert (await failure(mesh.llm.Chat(chat()))).reason is Reason.UNAUTHENTICATED
        assert (await failure(mesh.llm.Chat(chat(), metadata=who("eve")))).reason is Reason.UNAUTHENTICATED
        assert (await failure(mesh.llm.Chat(chat(), metadata=who("bob")))).reason is Reason.PERMISSION_DENIED
        drain = ms.DrainInstanceRequest(instance_id="a")
        assert (await failure(mesh.mesh.DrainInstance(drain, metadata=who("alice")))).reason is Reason.PERMISSION_DENIED
        ban = ms.BanInstanceRequest(instance_id="a")
        assert (await failure(mesh.mesh.BanInstance(ban, metadata=who("alice")))).reason is Reason.PERMISSION_DENIED
        await answer(mesh.llm.Chat(chat(max_tokens=60), metadata=who("alice")))
        limited = await failure(mesh.llm.Chat(chat(max_tokens=60), metadata=who("alice")))
        assert limited.reason is Reason.RATE_LIMITED and limited.retry_after_s > 0


async def test_a_gateway_drains_on_sigterm_and_a_taken_port_is_told(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": STEADY}) as mesh:
        health = health_pb2_grpc.HealthStub(mesh.channel)
        service = health_pb2.HealthCheckRequest(service="infermesh.v1.LanguageModelService")
        assert (await health.Check(service)).status == health_pb2.HealthCheckResponse.SERVING
        code = "import asyncio, sys; from services.gateway.app import run; from services.gateway.config import *; "
        code += f"sys.exit(asyncio.run(run(gateway_settings(grpc={mesh.address!r}, http=''))))"
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code), cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await second.communicate()
        assert second.returncode == 2 and out == b"" and mesh.address.encode() in err

        call = mesh.llm.Chat(chat(max_tokens=200))
        first = await call.read()
        mesh.stop.ask()

        async def unwell() -> bool:
            return (await health.Check(service)).status == health_pb2.HealthCheckResponse.NOT_SERVING  # type: ignore[no-any-return]

        await until(unwell, 3)
        refused = await failure(mesh.llm.Chat(chat()))
        assert refused.reason is Reason.DRAINING
        text, _ = await answer(call)
        assert len((first.deltas[0].content + text).split()) == 200
        assert await asyncio.wait_for(mesh.task, 20) == 0  # type: ignore[arg-type]


async def test_a_gateway_process_ends_on_sigterm(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    code = "import asyncio, sys, pathlib; from services.gateway.app import run; from services.gateway.config import *; "
    settings = {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0", "ready_file": str(ready)}
    code += f"sys.exit(asyncio.run(run(gateway_settings(**{settings!r}))))"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    await until(lambda: ready.exists() or process.returncode is not None, 60)
    assert json.loads(ready.read_text())["http"].startswith("127.0.0.1:")
    os.kill(process.pid, signal.SIGTERM)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0 and out == b"", err.decode()
    assert all(json.loads(line) for line in err.splitlines())


async def test_embed_stream_is_ordered_and_inherits_options(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": FAST}) as mesh:
        stub = em_grpc.EmbeddingServiceStub(mesh.channel)
        call = stub.EmbedStream()
        await call.write(em.EmbedStreamRequest(batch=em.EmbedRequest(model="chat", texts=["x"]), tag=1))
        await call.done_writing()
        error = await failure(call)
        assert error.reason is Reason.MODEL_NOT_FOUND and "kind llm" in error.message
