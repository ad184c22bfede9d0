"""Fairness between tenants: whose turn it is, and how much room one of them may take."""

from __future__ import annotations

from random import Random

from services.chassis.fairness import MEMORY_S, MOST_KEPT, Holdings, Size, Turns
from services.chassis.granting import Arbiter, Grant, Want
from tests.kit.routing import DONE, OLD, endpoint, pick, router

WHOLE = Size(16, 16_000)
ONE = Size(1, 1000)


def test_who_comes_back_is_level_not_owed_what_others_had_meanwhile() -> None:
    turns = Turns()
    turns.came("busy")
    for _ in range(10):
        turns.served("busy", 1.0)
    turns.came("back")
    assert turns.ahead() == {"busy": 1.0, "back": 0.0}, "one turn ahead, not ten"
    turns.served("back", 3.0)
    assert turns.ahead() == {"busy": 0.0, "back": 2.0}
    turns.left("back")
    turns.came("back")
    assert turns.ahead()["back"] == 2.0, "leaving for a moment forgives nothing"
    turns.left("back")
    assert turns.ahead() == {} and turns.ahead_of("back") == 2.0 and turns.waiting == {"busy": 1}


def test_service_is_shared_equally_whatever_a_request_weighs() -> None:
    chance, turns, given = Random(1), Turns(), {"small": 0.0, "large": 0.0}
    for tenant in given:
        turns.came(tenant)
    for _ in range(2000):
        ahead = turns.ahead()
        tenant = min(given, key=ahead.__getitem__)
        seconds = chance.uniform(0.05, 0.15) * (10 if tenant == "large" else 1)
        turns.served(tenant, seconds)
        given[tenant] += seconds
    assert abs(given["small"] / sum(given.values()) - 0.5) < 0.01


def test_room_that_another_tenant_used_lately_is_kept_for_it_and_forgotten_in_time() -> None:
    held = Holdings()
    for _ in range(14):
        held.take("greedy", ONE, 0.0)
    assert held.beyond(WHOLE, 0.0) == frozenset(), "alone, it may have everything"
    for _ in range(3):
        held.take("calm", ONE, 1.0)
    assert held.beyond(WHOLE, 1.0) == {"greedy"} and held.kept("greedy", WHOLE, 1.0) == Size(0, 0)
    for _ in range(3):
        held.give("calm", ONE)
    assert held.kept("greedy", WHOLE, 1.0) == Size(16 // MOST_KEPT, 16_000 // MOST_KEPT), "never more than that"
    later = 3 * MEMORY_S
    held.take("greedy", ONE, later)
    held.take("greedy", ONE, later + MEMORY_S)
    assert held.beyond(WHOLE, later + MEMORY_S) == frozenset(), "calm has not been seen for long"
    held.see("waits")
    assert held.beyond(WHOLE, later + 9 * MEMORY_S) == frozenset(), "who waited and left is forgotten"
    for _ in range(16):
        held.give("greedy", ONE)
    assert held.used() == 0


def test_the_larger_of_two_shares_counts() -> None:
    held = Holdings()
    held.take("many", Size(8, 800), 0.0)
    held.take("long", Size(1, 12_000), 0.0)
    assert held.beyond(WHOLE, 0.0) == {"long"}


def test_an_instance_hears_all_gateways_and_is_fair_over_all_of_them() -> None:
    room = Arbiter(0.2, 4, 0)
    for gateway in ("a", "b"):
        room.joined(gateway)
    inside = [room.arrive("a", 0.0, 1000, 0, 0, "greedy")[0] for _ in range(4)]
    room.want("a", Want(1, 1000, priority=9, age_s=25.0, tenant="greedy"), 1.0)
    room.want("b", Want(2, 5000, tenant="calm"), 1.0)
    assert room.grants(1.0) == []
    assert room.others("b", 1.0).beyond == {"greedy"}, "who waits has a share, too"
    room.ended(inside.pop(), 2.0)
    assert room.grants(2.0) == [Grant("b", 2)], "neither age nor its own priority puts a flood first"
    assert room.arrive("b", 2.0, 5000, 0, 2, "calm")[0]
    room.ended(inside.pop(), 3.0)
    assert room.grants(3.0) == [Grant("a", 1)], "what nobody else wants is its own"


def test_what_takes_no_room_may_outlast_what_is_remembered_of_its_tenant() -> None:
    """Tokenising has no slot and no KV cache; another tenant's request in the next window forgets who holds nothing."""
    r = router(endpoint("i", running=4))
    tokenizing = pick(r, OLD, tenant="a", slots=0, prompt_tokens=0, prompt_bytes=100).lease
    other = pick(r, OLD + MEMORY_S, tenant="b").lease
    for lease in (tokenizing, other):
        r.release(lease, DONE, OLD + MEMORY_S + 1)
    ledger = r.fleet.instances["i"].ledger
    assert not ledger.entries and ledger.holdings.used() == 0
