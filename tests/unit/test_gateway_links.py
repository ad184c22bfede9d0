"""What a gateway learns of its instances by Links and probes, and who gets what the router hands out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2_grpc

from infermesh.v1 import worker_pb2 as wk
from registry.port import Entry, Snapshot
from services.gateway.front.console.live import Live
from services.gateway.observe import Observe
from services.gateway.routing.admission import Bounds
from services.gateway.routing.decision import Abandon, Lease, Record
from services.gateway.routing.facts import Facts
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.channels import Channels
from services.gateway.upstream.link import Link
from tests.kit.fake_instance import fake_instance
from tests.kit.mesh import until
from tests.kit.routing import endpoint, router
from tests.kit.upstream import LEFT, silent, upstream


async def test_an_instance_that_missed_a_probe_comes_back_though_its_link_never_broke() -> None:
    async with fake_instance("a") as a, fake_instance("b") as b, upstream(a, b) as up:
        up.carrier.do(up.carrier.router.probed("a", 7, False, up.carrier.now()))
        assert up.state("a") == "ejected"
        await until(lambda: up.state("a") == "healthy", 20)
        assert a.links == 1 and up.carrier._probes == {}


async def test_a_thousand_callers_leave_in_the_moment_in_which_room_appears() -> None:
    """Each lease for one who has gone passes to the next: in a loop, not in a thousand nested calls."""
    bounds = Bounds(max_requests=2000, max_tokens=1 << 40)
    async with fake_instance("a", silent, max_running=1) as a, upstream(a, bounds=bounds) as up:
        first = asyncio.create_task(up.chat())
        await until(lambda: len(a.requests) == 1, 20)
        others = [asyncio.create_task(up.chat()) for _ in range(1000)]
        await until(lambda: up.carrier.router.waiting == 1000, 20)
        for task in (*others, first):
            task.cancel()
        instance = up.carrier.router.fleet.instances["a"]
        (seq,) = instance.ledger.entries
        ended = up.carrier.router.release(Lease(seq, "a", 7, Facts("llm", "m"), Record("llm", "m")), LEFT, 0.0)
        up.carrier.do(ended)
        await asyncio.gather(first, *others, return_exceptions=True)
        assert up.nothing_left() and len(a.requests) == 1


async def test_the_list_shows_what_is_registered_now_and_what_the_instance_says() -> None:
    async with fake_instance("a") as a, upstream(a) as up:
        assert [(view.weight, view.running) for view in up.directory.instances()] == [(1.0, None)]
        up.directory.apply(Snapshot((Entry(replace(a.endpoint, weight=3.0)),)))
        await a.frames.put(wk.LinkResponse(load=wk.Load(running=4)))
        await until(lambda: [(v.weight, v.running) for v in up.directory.instances()] == [(3.0, 4)], 20)
        assert up.directory.instances()[0].metadata["weight"] == "3.0" and up.directory.healthy == 1
        up.carrier.do(up.carrier.router.goodbye("a", 7, up.carrier.now()))
        assert up.directory.instances() == [] and up.directory.healthy == 0 and not up.directory._still


async def test_link_frames_drain_and_goodbye() -> None:
    async with fake_instance("a") as a, fake_instance("b") as b, upstream(a, b) as up:
        await a.frames.put(wk.LinkResponse(load=wk.Load(running=3, waiting=1, kv_used_ratio=0.5)))
        await until(lambda: up.directory.instances()[0].running == 3, 20)
        view = up.directory.instances()[0]
        assert (view.waiting, view.kv_used_ratio, view.in_flight) == (1, 0.5, 0)
        await a.frames.put(wk.LinkResponse(draining=wk.Draining(grace_ms=100)))
        await until(lambda: up.state("a") == "draining", 20)
        await a.frames.put(wk.LinkResponse(goodbye=wk.WorkerGoodbye(why="done")))
        await until(lambda: up.state("a") == "gone", 20)
        assert (await up.chat())[1].instance_id == "b"


async def test_a_caller_who_leaves_in_the_moment_in_which_he_is_served_leaves_nothing_behind() -> None:
    async with fake_instance("a", silent, max_running=1) as a, upstream(a) as up:
        first = asyncio.create_task(up.chat())
        await until(lambda: len(a.requests) == 1, 20)
        second = asyncio.create_task(up.chat())
        await until(lambda: up.carrier.router.waiting == 1, 20)
        (seq,) = up.carrier.router.fleet.instances["a"].ledger.entries
        up.carrier.release(Lease(seq, "a", 7, Facts("llm", "m"), Record("llm", "m")), LEFT)
        assert up.carrier.router.waiting == 0, "the lease is his, but he has not run since"
        for task in (second, first):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert up.nothing_left() and len(a.requests) == 1


async def test_an_abandoned_call_moves_and_one_that_is_over_is_no_concern() -> None:
    """Before its first event it goes elsewhere; the instance is told at once, and nothing is left behind."""
    async with fake_instance("a", silent) as a, fake_instance("b") as b, upstream(a, b) as up:
        up.directory.apply(Snapshot((Entry(a.endpoint), Entry(replace(b.endpoint, weight=0.01)))))
        call = asyncio.create_task(up.chat())
        await until(lambda: len(a.requests) == 1, 20)
        (seq,) = up.carrier.router.fleet.instances["a"].ledger.entries
        up.carrier.do([Abandon(seq, "the engine stands still"), Abandon(99, "never was")])
        text, identity = await call
        assert (text, identity.instance_id, identity.attempts) == (" w0 w1 w2", "b", 2)
        await until(lambda: a.cancelled == 1, 20)
        assert up.nothing_left() and up.carrier._calls == {}


class Mute(health_pb2_grpc.HealthServicer):
    """Takes every question and answers none."""

    async def Check(self, request: object, context: object) -> None:
        await asyncio.sleep(60)


async def test_a_probe_whose_time_passed_while_we_slept_says_nothing() -> None:
    """Without ticks, no time counts as passed: the deadline that gRPC's own threads saw was ours to miss."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(Mute(), server)
    frozen = endpoint("a", port=server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    carrier = Carrier(router(frozen), Channels(), Observe(), asyncio.get_running_loop().time)
    assert await carrier._check(frozen) is None
    ticks = asyncio.create_task(carrier.run())
    assert await carrier._check(frozen) is False
    ticks.cancel()
    await carrier.channels.close_all()
    await server.stop(0)


@pytest.mark.parametrize("turns", range(6))
async def test_what_follows_the_fleet_ends_when_it_is_told_to_in_the_moment_of_a_change(turns: int) -> None:
    """asyncio.wait_for of Python 3.11 may swallow that cancellation, and a gateway that stops would wait for ever."""
    async with upstream() as up:
        live = Live(up.directory, {}, {}, time.time, dict)
        for job in (up.directory.run(), live.run()):
            task = asyncio.create_task(job)
            for _ in range(5):
                await asyncio.sleep(0)
            up.carrier.touch()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=20)
            assert done


async def test_a_life_that_is_over_is_not_dialled_again() -> None:
    """What is opened then, nobody would close."""
    async with fake_instance("a") as a, upstream(a) as up:
        carrier, gone = up.carrier, replace(a.endpoint, incarnation=8)
        await carrier._ask(gone)
        await Link(carrier, gone, "gw-test").run()
        assert list(carrier.channels._lines) == [("a", 7)]


async def test_a_link_that_ended_though_its_life_goes_on_is_made_again() -> None:
    async with fake_instance("a") as a, upstream(a) as up:
        ((_, task),) = up.directory._links.values()
        task.cancel()
        await asyncio.wait({task})
        await until(lambda: a.links == 2 and up.state("a") == "healthy", 10)
