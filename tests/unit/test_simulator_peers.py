"""The peers' pickers against cases made by hand, and the eligible set that all policies share."""

from __future__ import annotations

import pytest

from registry.endpoint import Capacity, Endpoint, Speed
from services.gateway.routing.decision import Dispatch, Lease, Refuse
from services.gateway.routing.facts import End, Facts, LoadReport, Outcome
from services.gateway.simulator.fleet import Site
from services.gateway.simulator.ours import blinded
from services.gateway.simulator.peers import Peer
from services.gateway.simulator.policies import NAMES, PEERS, STRONGEST_FIRST, policy

SPEED = Speed(1000.0, 50_000.0, 10.0, 50.0, source="declared")
DONE = Outcome(End.DONE)


def endpoint(id: str, context_max: int = 32_768, speed: Speed = SPEED, kv_tokens: int = 100_000) -> Endpoint:
    capacity = Capacity(context_max=context_max, kv_tokens=kv_tokens, max_running=64)
    return Endpoint(id, "llm", "127.0.0.1", 1, "m", incarnation=1, speed=speed, capacity=capacity)


def site(*endpoints: Endpoint) -> Site:
    return Site(endpoints, {"llm": "m"}, {}, {}, 2.0, 80.0)


def peer(name: str, *ids: str) -> Peer:
    return PEERS[name].build(name, site(*(endpoint(id) for id in ids)), 512, 0.0)


def facts(blocks: tuple[int, ...] = (), prompt: int = 0) -> Facts:
    return Facts("llm", "m", prompt_tokens=prompt or 512 * max(1, len(blocks)), counted=True, chain=blocks)


def place(gateway: Peer, wanted: Facts, draw: float = 0.0) -> Lease:
    decision = gateway.pick(wanted, 0.0, draw)
    assert isinstance(decision, Dispatch)
    return decision.lease


def where(gateway: Peer, wanted: Facts, draw: float = 0.0) -> str:
    return place(gateway, wanted, draw).instance_id


def test_every_name_of_the_design_has_a_policy() -> None:
    assert set(NAMES) == {
        *("infermesh", "infermesh_blind", "infermesh_fcfs", "round_robin", "least_request", "power_of_two"),
        *("cache_aware", "scorer_sum", "kv_overlap_cost"),
    }
    assert set(STRONGEST_FIRST) == set(PEERS)
    assert [policy(name).name for name in NAMES] == list(NAMES)


@pytest.mark.parametrize("name", PEERS)
def test_all_choose_among_the_eligible_only(name: str) -> None:
    gateway = PEERS[name].build(name, site(endpoint("narrow", 1024), endpoint("wide")), 512, 0.0)
    assert {where(gateway, facts(prompt=5000), draw / 7) for draw in range(7)} == {"wide"}
    assert isinstance(gateway.pick(Facts("llm", "other"), 0.0, 0.0), Refuse)


def test_round_robin_takes_turns() -> None:
    gateway = peer("round_robin", "a", "b", "c")
    assert [where(gateway, facts()) for _ in range(5)] == ["a", "b", "c", "a", "b"]


def test_least_request_counts_what_is_in_flight() -> None:
    gateway = peer("least_request", "a", "b")
    first = place(gateway, facts())
    assert first.instance_id == "a" and where(gateway, facts()) == "b"
    gateway.release(first, DONE, 1.0)
    assert where(gateway, facts(), 0.9) == "a"


def test_power_of_two_takes_the_emptier_of_a_pair() -> None:
    gateway = peer("power_of_two", "a", "b", "c")
    pairs = {(0, 1): 0.0, (1, 2): 0.55, (2, 0): 0.7}
    assert where(gateway, facts(), pairs[0, 1]) == "a"
    assert where(gateway, facts(), pairs[0, 1]) == "b"
    assert where(gateway, facts(), pairs[1, 2]) == "c"
    assert gateway.active == {"a": 1, "b": 1, "c": 1}
    assert where(peer("power_of_two", "a"), facts(), 0.99) == "a"


def test_cache_aware_follows_the_longest_match_over_the_threshold() -> None:
    gateway = peer("cache_aware", "a", "b")
    assert where(gateway, facts((1, 2, 3, 4))) == "a"  # nothing known, nothing in flight: by chance
    assert where(gateway, facts((9, 8))) == "b"  # nothing matches: the fewest in flight
    assert where(gateway, facts((1, 2, 3, 5))) == "a"  # 3 of 4
    assert where(gateway, facts((9, 8, 7))) == "b"  # 2 of 3
    assert where(gateway, facts((9, 8, 7, 6))) == "b"
    assert where(gateway, facts((1, 20, 30, 40))) == "a"  # 1 of 4 is not over 0.3; a has 2 in flight, b 3
    assert where(gateway, facts((50, 60)), 0.9) == "b"  # 3 each: by chance


def test_cache_aware_turns_to_the_least_loaded_when_imbalanced() -> None:
    gateway = peer("cache_aware", "a", "b")
    place(gateway, facts((1, 2)))
    gateway.active.update(a=64, b=0)  # 64 apart is not over 64
    assert where(gateway, facts((1, 2))) == "a"
    gateway.active.update(a=65, b=0)
    assert where(gateway, facts((1, 2))) == "b"
    gateway.active.update(a=300, b=210)  # 90 apart, but not 1.5 times as many
    assert where(gateway, facts((1, 2))) == "a"


def test_scorer_sum_weighs_prefix_3_queue_2_kv_2() -> None:
    gateway = peer("scorer_sum", "a", "b")
    place(gateway, facts((1, 2, 3, 4)), 0.0)
    assert where(gateway, facts((1, 2, 3, 4)), 0.99) == "a"  # 3 more for the prefix
    gateway.report(endpoint("a"), LoadReport(waiting=5, kv_used_ratio=0.0), 0.0)
    assert where(gateway, facts((1, 2, 3, 4)), 0.99) == "a"  # 3 against 2 for the queue
    gateway.report(endpoint("a"), LoadReport(waiting=5, kv_used_ratio=0.6), 0.0)
    assert where(gateway, facts((1, 2, 3, 4))) == "b"  # 3 + 0.8 against 2 + 2
    # Half of the prefix there: 1.5 (b holds all of it now, a all of it too): the free one wins outright.
    assert where(gateway, facts((7, 8))) == "b"


def test_scorer_sum_remembers_as_much_as_the_instance_can_hold() -> None:
    gateway = PEERS["scorer_sum"].build("scorer_sum", site(endpoint("a", kv_tokens=1024), endpoint("b")), 512, 0.0)
    place(gateway, facts((1, 2)), 0.0)
    gateway.report(endpoint("b"), LoadReport(waiting=9), 0.0)
    assert where(gateway, facts((3, 4))) == "a"  # pushes 1 and 2 out
    gateway.report(endpoint("b"), LoadReport(waiting=0), 0.0)
    gateway.report(endpoint("a"), LoadReport(kv_used_ratio=0.01), 0.0)
    assert where(gateway, facts((1, 2))) == "b"


def test_kv_overlap_cost_adds_prefill_and_decode_blocks() -> None:
    gateway = peer("kv_overlap_cost", "a", "b")
    gateway.cache(endpoint("b"), True, (1, 2), 0.0)
    assert where(gateway, facts((1, 2, 3))) == "b"  # a: 3 + 3; b: 1 + 3
    # a: 4 + 4 = 8. b: prefill 1 + 4, decode 3 + 4 = 12.
    held = place(gateway, facts((5, 6, 7, 8)))
    assert held.instance_id == "a"
    gateway.started(held, 0.5)  # its prompt is computed: a costs 2 + (4 + 2) = 8, b (1 + 2) + (3 + 2) = 8
    assert where(gateway, facts((11, 12)), 0.9) == "b" and where(gateway, facts((11, 12)), 0.0) == "a"
    gateway.cache(endpoint("b"), False, (2,), 1.0)
    gateway.release(held, DONE, 1.0)
    assert where(gateway, facts((5, 6, 7, 8))) == "a"


def test_kv_overlap_cost_forgets_what_has_ended() -> None:
    gateway = peer("kv_overlap_cost", "a")
    leases = [place(gateway, facts((1, 2, n))) for n in range(3, 6)]
    for lease in leases[:2]:
        gateway.started(lease, 0.1)
    for lease in leases:
        gateway.release(lease, DONE, 0.2)
    again = vars(gateway)
    assert again["_prefill"] == {"a": 0.0} and again["_decode"] == {"a": {}} and again["_anonymous"] == {"a": 0.0}


def test_blind_means_the_mean_of_every_number() -> None:
    slow = Speed(500.0, 30_000.0, 30.0, 150.0, source="declared")
    for known in blinded((endpoint("a"), endpoint("b", speed=slow))):
        assert known.speed == Speed(750.0, 40_000.0, 20.0, 100.0, source="prior")
