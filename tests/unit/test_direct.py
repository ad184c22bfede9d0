"""Direct mode at the gateway: leases end once, whatever happens, and a caller's word proves nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1.inference_pb2 import Hints
from registry.endpoint import Capacity
from services.gateway.front.direct import PICK, wanted
from services.gateway.observe import Observe
from services.gateway.report import Report
from services.gateway.routing.admission import Bounds
from services.gateway.routing.facts import Facts, Member
from services.gateway.routing.router import Router
from services.gateway.tracing import Tracing
from services.gateway.upstream import direct as module
from services.gateway.upstream.calls import Call, Caller
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.channels import Channels
from services.gateway.upstream.direct import Direct, Picked
from services.gateway.upstream.forward import Forwarder
from tests.kit.collector import collector
from tests.kit.mesh import until
from tests.kit.routing import endpoint

FACTS = Facts(kind="llm", model="m", prompt_tokens=100, counted=True, max_tokens=50)
ALICE, BOB = Caller(tenant="alice"), Caller(tenant="bob")


@dataclass
class Desk:
    direct: Direct
    forwarder: Forwarder
    router: Router
    ended: list[Report] = field(default_factory=list)

    async def pick(self, caller: Caller = ALICE, left_s: float = 60.0, **more: object) -> Picked:
        deadline = self.forwarder.carrier.now() + left_s
        facts = Facts(**{"kind": "llm", "model": "m", "prompt_tokens": 100, "counted": True, **more})  # type: ignore[arg-type]
        return await self.direct.pick(facts, Call("req-1", caller, deadline))

    def in_flight(self) -> int:
        return sum(len(one.ledger.entries) for one in self.router.fleet.instances.values())

    def nothing_left(self) -> bool:
        fleet, budget = self.router.fleet, self.forwarder.budget
        ledgers = [one.ledger for one in (*fleet.instances.values(), *fleet.leaving.values())]
        zero = all(
            (x.own_prompt, x.own_work, x.own_output, x.own_slots, x.own_resident, len(x.entries), len(x.pending))
            == (0, 0, 0, 0, 0, 0, 0)
            for x in ledgers
        )
        gone = not fleet.leaving and not self.router.waiting and not self.direct.held and not self.direct._tenants
        return zero and gone and budget.live == budget.retrying == 0


@asynccontextmanager
async def desk(*ids: str, running: int = 4, bounds: Bounds | None = None) -> AsyncIterator[Desk]:
    """Instances that nobody dials: in direct mode a gateway needs none of them."""
    clock = asyncio.get_running_loop().time
    router = Router(clock() - 60, bounds)
    room = Capacity(max_running=running)
    members = [Member(endpoint(id, capacity=room, features=frozenset({"tools"}))) for id in ids]
    router.update(members, clock() - 60)
    for id in ids:
        router.linked(id, 1, clock())
    carrier = Carrier(router, Channels(), Observe(), clock)
    forwarder = Forwarder(carrier, carrier._observe, "gw-test")
    made = Desk(Direct(forwarder), forwarder, router)
    carrier._observe.listeners.append(made.ended.append)
    ticks = asyncio.create_task(carrier.run())
    try:
        yield made
    finally:
        ticks.cancel()
        await carrier.channels.close_all()


async def test_a_pick_reserves_and_its_report_gives_back_once() -> None:
    async with desk("a") as d:
        picked = await d.pick()
        assert (picked.address, picked.ids, picked.relay.seq, picked.relay.tenant) == (
            "127.0.0.1:9",
            ("a", "m"),
            1,
            "alice",
        )
        assert picked.relay.gateway_id == "gw-test" and len(picked.relay.cache_salt) == 16
        assert picked.metadata == {"x-request-id": "req-1"} and 60 < picked.expires_s <= 70
        assert d.in_flight() == 1 and d.forwarder.budget.live == 0
        d.direct.report(picked.id, "alice", "ok", (100, 7))
        assert d.nothing_left()
        ended = d.ended[0]
        assert (ended.method, ended.outcome, ended.completion_tokens, ended.instance) == ("direct", "ok", 7, "a")
        assert ended.record is not None and ended.record.chosen == "a" and ended.tried[0].outcome == "ok"
        with pytest.raises(MeshError) as caught:
            d.direct.report(picked.id, "alice", "ok")
        assert caught.value.reason is Reason.NOT_FOUND and len(d.ended) == 1 and d.nothing_left()


async def test_its_spans_are_a_routes_and_an_attempts_and_the_callers_trace_goes_on() -> None:
    async with collector() as sink, desk("a") as d:
        tracing = Tracing(sink.address, "gw")
        d.forwarder.observe = Observe(tracing)
        trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        picked = await d.direct.pick(FACTS, Call("req-1", ALICE, trace=trace, entrance=PICK))
        d.direct.report(picked.id, "alice", "stream_lost", (100, 3))
        with pytest.raises(MeshError):
            await d.direct.pick(Facts("llm", "none"), Call("req-2", ALICE, trace=trace, entrance=PICK))
        await tracing.close()
    routes, (attempt,) = sink.named("route"), sink.named("attempt")
    assert picked.metadata["traceparent"].split("-")[2] == attempt.id and attempt.parent == routes[0].id
    assert routes[0].attributes["gen_ai.operation.name"] == "direct"
    assert [route.attributes["error.type"] for route in routes] == ["stream_lost", "model_not_found"]
    assert routes[0].attributes["infermesh.route.chosen"] == "a"


async def test_a_lease_of_another_tenant_stays_what_it_is() -> None:
    async with desk("a") as d:
        picked = await d.pick()
        for id, tenant in ((picked.id, "bob"), ("none", "alice"), ("", "alice")):
            with pytest.raises(MeshError, match="there is no lease") as caught:
                d.direct.report(id, tenant, "ok")
            assert caught.value.reason is Reason.NOT_FOUND
        assert d.in_flight() == d.direct.held == 1
        d.direct.report(picked.id, "alice", "ok")
        assert d.nothing_left()


async def test_without_a_report_it_ends_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    async with desk("a") as d:
        picked = await d.pick(left_s=0.1)
        await until(d.nothing_left, 20)
        assert d.ended[0].outcome == "deadline_exceeded"
        with pytest.raises(MeshError):
            d.direct.report(picked.id, "alice", "ok")


async def test_it_waits_for_room_like_any_other_and_a_report_lets_it_in() -> None:
    async with desk("a", running=1) as d:
        first = await d.pick()
        second = asyncio.create_task(d.pick(BOB))
        await until(lambda: d.router.waiting == 1)
        d.direct.report(first.id, "alice", "ok")
        d.direct.report((await second).id, "bob", "ok")
        assert d.nothing_left()
        late = [asyncio.create_task(d.pick()), asyncio.create_task(d.pick(left_s=0.2))]
        with pytest.raises(MeshError) as caught:
            await late[1]
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        d.direct.report((await late[0]).id, "alice", "ok")
        assert d.nothing_left()


async def test_the_same_refusals_as_for_a_forwarded_request() -> None:
    async with desk("a", running=1, bounds=Bounds(0, 1, 1.0)) as d:
        for more, reason in (
            ({"model": "other"}, Reason.MODEL_NOT_FOUND),
            ({"features": frozenset({"grammar"})}, Reason.UNSUPPORTED),
            ({"excluded": frozenset({"a"})}, Reason.NO_INSTANCE),
            ({"excluded": frozenset({"127.0.0.1:9"})}, Reason.NO_INSTANCE),
        ):
            with pytest.raises(MeshError) as caught:
                await d.pick(**more)
            assert caught.value.reason is reason, more
        poor = Caller(tenant="poor", tokens_per_minute=500)
        held = await d.pick(poor, max_tokens=350)
        with pytest.raises(MeshError) as caught:
            await d.pick(poor, max_tokens=350)
        assert caught.value.reason is Reason.RATE_LIMITED
        with pytest.raises(MeshError) as caught:
            await d.pick()
        assert caught.value.reason is Reason.QUEUE_FULL
        d.direct.report(held.id, "poor", "ok", (1, 1))
        with pytest.raises(MeshError) as caught:
            await d.pick(poor, max_tokens=350)
        assert caught.value.reason is Reason.RATE_LIMITED, "a caller's word earns no tokens back"
        assert d.nothing_left()


async def test_a_tenant_has_a_bounded_number_of_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    async with desk("a", running=9) as d:
        held = [await d.pick() for _ in range(2)]
        with pytest.raises(MeshError, match="2 leases of this tenant") as caught:
            await d.pick()
        assert caught.value.reason is Reason.QUEUE_FULL
        held.append(await d.pick(BOB))
        for one, tenant in zip(held, ("alice", "alice", "bob"), strict=True):
            d.direct.report(one.id, tenant, "ok")
        assert d.nothing_left()


@pytest.mark.parametrize("outcome", ["instance_lost", "engine_failed", "ok"])
async def test_a_callers_word_has_the_instance_asked_at_most(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with desk("a", "b") as d:
        asked: list[str] = []
        monkeypatch.setattr(d.forwarder.carrier, "_probe", asked.append)
        for _ in range(50):
            picked = await d.pick()
            d.direct.report(picked.id, "alice", outcome, (1 << 20, 1 << 20))
        instances = d.router.fleet.instances.values()
        assert [one.state.value for one in instances] == ["healthy"] * 2
        assert all(one.tally.window(d.forwarder.carrier.now()) == (0, 0) for one in instances), "it counts nowhere"
        assert d.router.estimate(FACTS) == (100, 50) and d.router.estimate(Facts("llm", "m"))[1] == 256
        assert set(asked) == (set() if outcome == "ok" else {"a", "b"})
        assert d.nothing_left()


async def test_an_instance_that_leaves_is_not_picked_and_its_leases_end_well() -> None:
    async with desk("a", "b") as d:
        picks = [await d.pick(prompt_tokens=1) for _ in range(4)]
        assert {one.ids[0] for one in picks} == {"a", "b"}
        carrier = d.forwarder.carrier
        carrier.do(d.router.draining("a", 1, carrier.now()))
        picks += [await d.pick(prompt_tokens=1) for _ in range(2)]
        assert {one.ids[0] for one in picks[4:]} == {"b"}
        carrier.do(d.router.update([Member(endpoint("b"))], carrier.now()))
        carrier.do(d.router.goodbye("a", 1, carrier.now()))
        for one in picks:
            d.direct.report(one.id, "alice", "instance_lost" if one.ids[0] == "a" else "ok")
        assert d.nothing_left()


async def test_nothing_is_left_of_ten_thousand_that_end_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while they wait or once they have a lease, reported as this or that, or never."""
    monkeypatch.setattr(module, "GRACE_S", 0.02)
    rng = random.Random(7)
    async with desk("a", "b", "c", running=8) as d:

        async def one(number: int) -> None:
            tenant, vanishes = f"t{number % 5}", not number % 20
            prompt = rng.randrange(1, 2000)
            picked = await d.pick(Caller(tenant=tenant), left_s=0.02 if vanishes else 60, prompt_tokens=prompt)
            try:
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
            finally:
                if not vanishes:
                    outcome = rng.choice(["ok", "cancelled", "queue_full"])
                    d.direct.report(picked.id, tenant, outcome, (1, rng.randrange(9)))

        for _ in range(50):
            tasks = [asyncio.create_task(one(number)) for number in range(200)]
            for task in rng.sample(tasks, 120):
                if rng.random() < 0.5:
                    await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait(tasks, timeout=30)
            assert all(task.done() for task in tasks)
        await until(d.nothing_left, 20)
        outcomes = {report.outcome for report in d.ended}
        assert {"ok", "cancelled", "queue_full", "deadline_exceeded"} <= outcomes and len(d.ended) > 5000


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ms.PickRequest(), "model"),
        (ms.PickRequest(model="m", kind="gateway"), "kind"),
        (ms.PickRequest(model="m" * 257), "model"),
        (ms.PickRequest(model="m", prompt_tokens=1 << 40), "prompt_tokens"),
        (ms.PickRequest(model="m", max_tokens=1 << 63), "max_tokens"),
        (ms.PickRequest(model="m", prompt_bytes=1 << 40), "prompt_bytes"),
        (ms.PickRequest(model="m", choices=1000), "choices"),
        (ms.PickRequest(model="m", excluded=["x"] * 17), "excluded"),
        (ms.PickRequest(model="m", features=["x" * 257]), "features"),
        (ms.PickRequest(model="m", hints=Hints(priority=101)), "hints.priority"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(request_: ms.PickRequest, param: str) -> None:
    with pytest.raises(MeshError) as caught:
        wanted(request_, ALICE)
    assert (caught.value.reason, caught.value.param) == (Reason.INVALID_ARGUMENT, param)


def test_a_key_for_other_models_may_not_pick_this_one() -> None:
    with pytest.raises(MeshError) as caught:
        wanted(ms.PickRequest(model="m"), Caller(models=("other",)))
    assert caught.value.reason is Reason.PERMISSION_DENIED
