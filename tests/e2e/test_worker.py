"""Describe, Link and Drain over a real server and channel."""

import asyncio
import dataclasses

import grpc
import grpc.aio
import pytest

from infermesh.errors import MeshError, Reason, from_rpc
from infermesh.transport import channel_options
from infermesh.v1 import worker_pb2 as wk
from infermesh.v1 import worker_pb2_grpc
from infermesh.v1.inference_pb2 import Relay
from registry.endpoint import Endpoint
from services.chassis.arrivals import Arrivals
from services.chassis.keys import Keys
from services.chassis.server import Phase, Server
from services.chassis.worker import Worker
from tests.kit.mesh import until

ENDPOINT = Endpoint(id="llm-1", kind="llm", host="127.0.0.1", port=1, model="m", incarnation=77)


@dataclasses.dataclass
class Bench:
    stub: worker_pb2_grpc.WorkerServiceStub
    worker: Worker
    arrivals: Arrivals
    load: wk.Load
    drains: list


@pytest.fixture
async def bench():
    load, drains, arrivals = wk.Load(running=0), [], Arrivals()

    def snapshot() -> wk.Load:
        copy = wk.Load()
        copy.CopyFrom(load)
        return copy

    worker = Worker(lambda: ENDPOINT, snapshot, arrivals, Keys(), drains.append)
    server = Server(())
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server.grpc)
    port = await server.start("127.0.0.1:0")
    await server.enter(Phase.SERVING)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
        yield Bench(worker_pb2_grpc.WorkerServiceStub(channel), worker, arrivals, load, drains)
    await server.stop(0)


async def test_describe_tells_what_is_registered(bench):
    reply = await bench.stub.Describe(wk.DescribeRequest())
    assert (reply.instance_id, reply.incarnation, reply.metadata["model"]) == ("llm-1", 77, "m")


async def link(bench, interval_ms=20):
    call = bench.stub.Link()
    await call.write(wk.LinkRequest(hello=wk.GatewayHello(gateway_id="g", load_interval_ms=interval_ms)))
    hello = await call.read()
    assert (hello.hello.instance_id, hello.hello.incarnation) == ("llm-1", 77)
    return call


async def test_load_comes_when_it_changes_and_as_a_heartbeat(bench):
    call = await link(bench)
    first = (await call.read()).load
    assert first.running == 0
    with bench.arrivals.enter(Relay(gateway_id="g", seq=9), tokens=40):
        bench.load.running = 1
        changed = (await call.read()).load
        assert (changed.running, changed.seen_seq, changed.own_running, changed.own_queued_tokens) == (1, 9, 1, 40)
        beat = (await call.read()).load
        assert beat.running == 1 and beat.taken_at_ms - changed.taken_at_ms >= 990
    call.cancel()


async def test_a_drain_is_told_once_to_every_gateway(bench):
    first, second = await link(bench), await link(bench)
    bench.worker.announce_drain(2.5)
    for call in (first, second):
        frames = [await call.read() for _ in range(3)]
        assert [f.draining.grace_ms for f in frames if f.WhichOneof("frame") == "draining"] == [2500]
        call.cancel()
    assert (await bench.stub.Describe(wk.DescribeRequest())).draining


async def test_an_instance_says_goodbye_to_every_gateway(bench):
    first, second = await link(bench), await link(bench, interval_ms=60_000)
    bench.worker.announce_goodbye("stopped")
    for call in (first, second):
        frames = []
        while (frame := await call.read()) is not grpc.aio.EOF:
            frames.append(frame)
        assert frames[-1].goodbye.why == "stopped" and len(frames) <= 2


async def test_a_gateways_wish_for_few_frames_does_not_stop_the_heartbeat(bench):
    call = await link(bench, interval_ms=60_000)
    async with asyncio.timeout(30):
        assert [(await call.read()).WhichOneof("frame") for _ in range(2)] == ["load", "load"]
    call.cancel()


async def test_goodbye_ends_the_link(bench):
    call = await link(bench)
    await call.write(wk.LinkRequest(goodbye=wk.GatewayGoodbye()))
    frames = 0
    while await call.read() is not grpc.aio.EOF:
        frames += 1
    assert frames <= 2
    assert await call.code() == grpc.StatusCode.OK


async def test_a_link_begins_with_hello(bench):
    call = bench.stub.Link()
    await call.write(wk.LinkRequest(goodbye=wk.GatewayGoodbye()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
        await call.read()
    assert from_rpc(caught.value).reason is Reason.INVALID_ARGUMENT


async def test_drain_is_for_this_instance_only(bench):
    await bench.stub.Drain(wk.DrainRequest(instance_id="llm-1", grace_ms=1500))
    assert bench.drains == [1.5]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bench.stub.Drain(wk.DrainRequest(instance_id="other"))
    assert from_rpc(caught.value).param == "instance_id"


async def test_what_is_not_served_says_so(bench):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in bench.stub.Calibrate(wk.CalibrateRequest()):
            pass
    assert from_rpc(caught.value).reason is Reason.UNIMPLEMENTED


async def joined(bench, gateway: str, *features: str):
    call = bench.stub.Link()
    hello = wk.GatewayHello(gateway_id=gateway, load_interval_ms=20, features=features)
    await call.write(wk.LinkRequest(hello=hello))
    assert "grant" in (await call.read()).hello.features
    return call


async def heard(call, which: str):
    async with asyncio.timeout(10):
        while (frame := await call.read()).WhichOneof("frame") != which:
            pass
    return getattr(frame, which)


def sent(gateway: str, seq: int, grant: int = 0) -> Relay:
    return Relay(gateway_id=gateway, seq=seq, work_us=60_000_000, grant=grant)


async def test_gateways_ask_and_the_instance_grants_to_the_best(bench):
    arrivals = bench.arrivals
    arrivals.room.arbiter.resize(0.2, 0, 0)
    a, b = await joined(bench, "a", "grant"), await joined(bench, "b", "grant")
    await heard(b, "load")
    with arrivals.enter(sent("a", 1), tokens=10) as entry:
        with pytest.raises(MeshError) as full, arrivals.enter(sent("b", 1), tokens=10):
            pass
        assert full.value.reason is Reason.INSTANCE_FULL and full.value.retry_after_s > 30
        await a.write(wk.LinkRequest(want=wk.Want(ticket=5, work_us=2_000_000, waiting=1, line_ms=[0, 2000])))
        await b.write(wk.LinkRequest(want=wk.Want(ticket=9, work_us=1_000_000, waiting=1, line_ms=[1000])))
        while not (load := await heard(a, "load")).foreign_waiting:
            pass
        assert load.gateways == 2 and list(load.foreign_line_ms) == [1000]
        while not (load := await heard(b, "load")).foreign_waiting:
            pass
        assert load.foreign_work_us > 30_000_000
        entry.started()
        assert (await heard(b, "grant")).ticket == 9
        await b.write(wk.LinkRequest(decline=wk.Decline(ticket=9)))
        grant = await heard(a, "grant")
        assert grant.ticket == 5 and grant.expires_ms > 0
        with arrivals.enter(sent("a", 2, grant.ticket), tokens=10):
            assert arrivals.room.arbiter.in_use()["granted"] == 0
    a.cancel()
    b.cancel()
    await until(lambda: not any(arrivals.room.arbiter.in_use().values()), 10)


async def test_load_frames_tell_what_the_engines_steps_have_left(bench):
    bench.load.queued_tokens = 9000  # as an engine counts that knows no more
    gateway, room = await joined(bench, "a", "grant"), bench.arrivals.room
    with bench.arrivals.enter(Relay(gateway_id="a", seq=1, uncached_tokens=3000, work_us=9_000_000), tokens=9000):
        while not (load := await heard(gateway, "load")).own_queued_tokens:
            pass
        assert (load.own_queued_tokens, load.queued_tokens) == (3000, 9000), "it tells nothing of its steps"
        room.computed(1000)
        bench.load.running = 1
        while (load := await heard(gateway, "load")).own_queued_tokens != 2000:
            pass
        assert load.queued_tokens == 2000
    gateway.cancel()


async def test_gateways_of_an_older_version_are_served_as_ever(bench):
    new, old = await joined(bench, "new", "grant"), await joined(bench, "old")
    load = await heard(old, "load")
    assert not load.gateways and not load.HasField("foreign_work_us")
    assert (await heard(new, "load")).gateways == 1
    with bench.arrivals.enter(sent("new", 1), tokens=10), bench.arrivals.enter(sent("old", 1), tokens=10):
        assert bench.arrivals.running == 2
