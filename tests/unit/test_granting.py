"""The arbiter of an instance's room: who is granted, who is refused, and that nothing is ever left booked."""

from __future__ import annotations

from random import Random

import pytest

from infermesh.v1.worker_pb2 import Load
from registry.endpoint import Endpoint, Speed
from services.chassis.granting import EXPIRY_S, SIZES, Arbiter, Grant, Others, Want
from services.chassis.room import Room

S = 1_000_000  # µs


def arbiter(*gateways: str, depth_s: float = 0.2, running: int = 0, kv: int = 0) -> Arbiter:
    made = Arbiter(depth_s, running, kv)
    for gateway in gateways:
        made.joined(gateway)
    return made


def test_the_best_of_all_gateways_is_granted_and_the_queue_stays_shallow() -> None:
    room = arbiter("a", "b", "c")
    room.want("a", Want(1, 2 * S), 0.0)
    room.want("b", Want(7, S), 0.0)
    room.want("c", Want(3, 3 * S), 0.0)
    assert room.grants(0.0) == [Grant("b", 7)], "one second of work is more than the depth"
    assert room.grants(0.0) == []
    number, _ = room.arrive("b", 0.001, S, 0, 7)
    assert number and room.grants(0.001) == []
    due = room.due(0.001)
    assert due == pytest.approx(0.801, abs=1e-3), "when 0.2 s are left"
    assert room.grants(due) == [Grant("a", 1)]


def test_prompts_that_one_step_computes_make_room_together() -> None:
    room = Arbiter(0.2, step_s=0.5)
    room.joined("a")
    numbers = [room.arrive("a", 0.0, S // 4)[0] for _ in range(3)]
    room.want("a", Want(1, S // 4), 0.0)
    assert room.grants(0.0) == [] and room.wait_us(0.3) == pytest.approx(0.45 * S)
    assert room.wait_us(9.0) == S // 4, "the third does not fit into the first step"
    assert room.due(9.0) is None and room.grants(9.0) == [], "only the end of that step can make room"
    for number in numbers[:2]:
        room.started(number, 9.0)
    due = room.due(9.0)
    assert due == pytest.approx(9.05, abs=1e-3), "when 0.2 s are left"
    assert room.grants(due) == [Grant("a", 1)]


def test_an_instance_arbitrates_with_the_steps_of_its_own_speed() -> None:
    now = [0.0]
    speed = Speed(prefill_tps=4096.0, prefill_doubling_ctx=50_000.0, step_ms=10.0)
    room = Room(lambda: now[0])
    room.fit(Endpoint(id="a", kind="llm", host="h", port=1, model="m", incarnation=1, speed=speed), Load)
    for _ in range(3):
        room.arrive(None, 1000)
    now[0] = 9.0
    assert room.arbiter.wait_us(9.0) == pytest.approx(S * 1000 / 4096, rel=0.01), "two of three fit into 2,048 tokens"


def test_a_prompt_that_is_sooner_through_than_thought_makes_room_at_once() -> None:
    room = arbiter("a", "b")
    number, _ = room.arrive("a", 0.0, 4 * S, tokens=8000)
    room.want("b", Want(7, S), 0.0)
    assert room.grants(1.0) == [] and room.due(1.0) == pytest.approx(3.8, abs=1e-3)
    room.computed(6000, 1.0)
    assert room.grants(1.0) == [] and room.due(1.0) == pytest.approx(1.8, abs=1e-3)
    room.computed(1900, 1.2)
    assert room.grants(1.2) == [Grant("b", 7)]
    room.ended(number, 2.0)
    assert not room.in_use()["work"]


def test_rank_goes_before_priority_before_work_and_age_counts_at_a_discount() -> None:
    for better, worse in (
        (Want(1, 9 * S, rank=0), Want(1, S, rank=1)),
        (Want(1, 9 * S, priority=1), Want(1, S)),
        (Want(1, 2 * S, bias_us=-2 * S), Want(1, S)),
        (Want(1, 2 * S, age_s=60.0), Want(1, S)),
    ):
        room = arbiter("a", "b")
        room.want("a", worse, 100.0)
        room.want("b", better, 100.0)
        assert room.grants(100.0)[0].gateway == "b"


def test_who_did_not_ask_finds_room_or_is_refused_with_what_is_queued() -> None:
    room = arbiter("a", "b")
    assert room.arrive("a", 0.0, S)[0]
    assert room.arrive("b", 0.0, S) == (0, 1.0)
    assert room.arrive("old", 0.0, S)[0] and room.arrive("", 0.0, S)[0], "those who cannot ask are never refused"
    room = arbiter("a")
    assert room.arrive("a", 0.0, 9 * S)[0] and room.arrive("a", 0.0, S)[0], "with one gateway, it knows by itself"


def test_slots_and_kv_room_are_the_instances_own() -> None:
    room = arbiter("a", "b", running=1)
    first, _ = room.arrive("a", 0.0)
    room.want("b", Want(1, 0), 0.0)
    assert room.grants(0.0) == []
    room.ended(first, 1.0)
    assert room.grants(1.0) == [Grant("b", 1)]
    room = arbiter("a", "b", kv=1000)
    room.engine(0.9, 3)
    room.want("a", Want(1, 0, kv_tokens=80, spare_tokens=50), 0.0)
    assert room.grants(0.0) == []
    room.engine(0.8, 3)
    assert room.grants(0.0) == [Grant("a", 1)]
    assert room.arrive("b", 0.0, 0, 150)[0] == 0, "what is granted is taken"


def test_a_gateway_that_vanishes_or_hangs_blocks_nobody() -> None:
    room = arbiter("a", "b", "c")
    room.want("a", Want(1, 5 * S), 0.0)
    assert room.grants(0.0)
    room.want("b", Want(2, 6 * S), 0.0)
    assert room.grants(0.0) == []
    room.left("a")
    assert room.grants(0.0) == [Grant("b", 2)], "its Link broke"
    room.want("c", Want(3, S), 0.0)
    assert room.grants(EXPIRY_S - 0.01) == [] and room.due(0.1) == EXPIRY_S
    assert room.grants(EXPIRY_S) == [Grant("c", 3)], "its grant expired"
    room.decline("c", 3)
    assert room.arrive("b", 1.0, S, 0, 2)[0], "late, and there is room again"


def test_each_gateway_is_told_of_the_others() -> None:
    room = arbiter("a", "b")
    room.arrive("a", 0.0, 100)
    room.arrive("b", 0.0, 50)
    room.want("b", Want(4, S, line_ms=(0, 5, 7), waiting=2), 0.0)
    assert room.others("a", 0.0) == Others(2, 50, (0, 5, 7), 2)
    assert room.others("b", 0.0) == Others(2, 100, (), 0)
    assert room.others("b", 1.0).work_us == 0, "the head has had its time"


def test_nothing_is_left_booked_whatever_happens() -> None:
    """10,000 steps of requests that come, start, end or vanish, grants used, declined, lost and late, Links that break
    and overlap; equal inputs give equal grants."""
    logs = [churn(seed) for seed in (1, 2, 1)]
    assert logs[0] == logs[2] != logs[1]


def churn(seed: int) -> list[Grant]:
    chance = Random(seed)
    room = Arbiter(0.2, 40, 100_000)
    names = [f"g{i}" for i in range(5)]
    links: list[str] = []
    held: list[Grant] = []
    flying: list[int] = []
    log: list[Grant] = []
    now = 0.0
    for step in range(10_000):
        now += chance.expovariate(50)
        name = chance.choice(names)
        match chance.randrange(10):
            case 0 if len(links) < 8:
                room.joined(name)
                links.append(name)
            case 1 if links and chance.random() < 0.2:
                room.left(links.pop(chance.randrange(len(links))))
            case 2 | 3 | 4:
                sizes = tuple(chance.randrange(50) for _ in range(chance.randrange(SIZES + 3)))
                kv = chance.randrange(30_000)
                room.want(name, Want(step * (chance.random() < 0.9), chance.randrange(S), kv, line_ms=sizes), now)
            case 5 | 6:
                grant = held.pop(chance.randrange(len(held))) if held and chance.random() < 0.7 else Grant(name, 0)
                work, tokens = chance.randrange(S), chance.randrange(5000)
                number, queued = room.arrive(grant.gateway, now, work, 100, grant.ticket, tokens=tokens)
                assert queued >= 0
                if number:
                    flying.append(number)
            case 7 if held:
                lost = held.pop(chance.randrange(len(held)))
                if chance.random() < 0.5:
                    room.decline(*lost)
            case 8 if flying:
                room.started(chance.choice(flying), now)
            case _ if flying:
                room.ended(flying.pop(chance.randrange(len(flying))), now)
        room.computed(chance.randrange(2048), now)
        room.engine(chance.random() * 0.5, len(flying))
        found = room.grants(now)
        held += found
        log += found
        assert all(value >= 0 for value in room.in_use().values()) and room.wait_us(now) >= 0
        assert all(value >= 0 for value in (room.others(name, now).work_us, room.others(name, now).waiting))
    for number in flying:
        room.ended(number, now)
        room.ended(number, now)
    for name in links:
        room.left(name)
    assert set(room.in_use().values()) == {0}
    return log


def test_the_next_grant_waits_until_the_gateway_that_got_the_last_says_who_is_next() -> None:
    room = arbiter("a", "b")
    room.want("a", Want(1, S // 100), 0.0)
    room.want("b", Want(5, S // 20), 0.0)
    assert room.grants(0.0) == [Grant("a", 1)] and room.grants(0.001) == []
    room.want("a", Want(2, S // 50), 0.002)
    assert room.grants(0.002) == [Grant("a", 2)], "there is room for b, but a's second is shorter than b's first"
    room.want("a", Want(0, 0), 0.004)
    assert room.grants(0.004) == [Grant("b", 5)]


def test_a_gateway_that_says_nothing_holds_nobody_up_for_longer_than_its_grant_lasts() -> None:
    room = arbiter("a", "b")
    room.want("a", Want(1, S // 100), 0.0)
    room.want("b", Want(5, S // 20), 0.0)
    assert room.grants(0.0) == [Grant("a", 1)]
    room.decline("a", 1)
    assert room.grants(0.005) == [] and room.due(0.005) == pytest.approx(0.01)
    assert room.grants(0.01) == [Grant("b", 5)]
    room.left("a")
    room.want("b", Want(6, S // 20), 0.011)
    assert room.grants(0.011) == [Grant("b", 6)], "alone, there is nobody to wait for"


def test_a_tenant_is_not_charged_for_a_grant_that_is_declined() -> None:
    room = arbiter("a", "b")
    room.want("a", Want(1, S // 100, tenant="x", service_us=9 * S), 0.0)
    room.want("b", Want(5, S // 20, tenant="y", service_us=S), 0.0)
    assert room.grants(0.0) == [Grant("a", 1)]
    room.decline("a", 1)
    room.want("a", Want(2, S // 100, tenant="x", service_us=9 * S), 0.001)
    assert room.grants(0.001) == [Grant("a", 2)], "it has had nothing yet"
