"""Whatever happens in whatever order: same inputs, same decisions; no lease leaks; nothing in flight is negative."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from registry.endpoint import Capacity
from services.gateway.routing.admission import Bounds
from services.gateway.routing.decision import Dispatch, Effect, Lease, Wait
from services.gateway.routing.facts import End, LoadReport, Outcome
from services.gateway.routing.router import Router
from tests.unit.test_routing_serving import NOW, endpoint, facts, router

CASES = 10_000
WHAT = ("pick", "pick", "pick", "started", "release", "cancel", "report", "tick")
Step = tuple[str, int, float]


def replay(steps: list[Step]) -> tuple[list[object], Router]:
    fleet = (endpoint("a", 4000), endpoint("b", 900, capacity=Capacity(max_running=3, kv_tokens=9000)), endpoint("c"))
    r = router(*fleet, bounds=Bounds(max_requests=6, max_wait_s=4))
    leases: list[Lease] = []
    tickets: list[int] = []
    said: list[object] = []
    now = NOW

    def carry(effects: list[Effect]) -> None:
        said.append(effects)
        for effect in effects:
            if getattr(effect, "ticket", 0):
                tickets.remove(effect.ticket)  # type: ignore[union-attr]
            if isinstance(effect, Dispatch):
                leases.append(effect.lease)

    for what, number, draw in steps:
        now += draw / 10
        if what == "pick":
            chain = tuple(range(number % 7 * 100, number % 7 * 100 + 4))
            d = r.pick(facts(number + 1, chain=chain, chain_share=0.2, tenant=str(number % 3), since=now), now, draw)
            said.append(d)
            if isinstance(d, Dispatch):
                leases.append(d.lease)
            elif isinstance(d, Wait):
                tickets.append(d.ticket)
        elif what == "started" and leases:
            carry(r.started(leases[number % len(leases)], now))
        elif what == "release" and leases:
            end = list(End)[number % len(End)]
            carry(r.release(leases.pop(number % len(leases)), Outcome(end, prompt_tokens=number), now))
        elif what == "cancel" and tickets:
            carry(r.cancel(tickets.pop(number % len(tickets)), now))
        elif what == "report":
            load = LoadReport(number % 5, 0, number, draw, number, None, number, number % 3, number // 2)
            carry(r.report("abc"[number % 3], 1, load, now))
        elif what == "tick":
            carry(r.tick(now))
        for instance in r.fleet.instances.values():
            ledger = instance.ledger
            assert min(ledger.own_work, ledger.own_prompt, ledger.own_slots, ledger.foreign_work) >= 0
            assert ledger.wait_s(now) >= 0 and instance.line.seconds >= 0
    while leases or tickets:
        while leases:
            carry(r.release(leases.pop(), Outcome(End.CANCELLED), now))
        now += 5
        carry(r.tick(now))
    return said, r


def check(steps: list[Step]) -> None:
    said, r = replay(steps)
    assert replay(steps)[0] == said
    for instance in r.fleet.instances.values():
        ledger = instance.ledger
        assert (ledger.entries, ledger.pending, instance.line.count, r.waiting) == ({}, {}, 0, 0)
        assert (ledger.own_prompt, ledger.own_work, ledger.own_output, ledger.own_slots) == (0, 0, 0, 0)
        assert ledger.own_resident == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(WHAT), st.integers(0, 4000), st.floats(0, 0.999)), max_size=40))
def test_same_inputs_same_decisions_and_nothing_leaks(steps: list[Step]) -> None:
    check(steps)


def test_ten_thousand_made_up_cases() -> None:
    """Hypothesis finds the small case, chance the many: it makes steps fifty times as fast."""
    for seed in range(CASES):
        chance = Random(seed)
        count = chance.randrange(1, 16)
        check([(chance.choice(WHAT), chance.randrange(4000), chance.random()) for _ in range(count)])


def test_ten_thousand_cancels_leave_nothing() -> None:
    r = router(endpoint("a", 4000, capacity=Capacity(max_running=8)), bounds=Bounds(max_requests=200))
    chance, now = Random(7), NOW
    leases: list[Lease] = []
    tickets: list[int] = []
    cancelled = 0

    def carry(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Dispatch):
                tickets.remove(effect.ticket)
                leases.append(effect.lease)

    while cancelled < CASES:
        now += 0.001
        decision = r.pick(facts(chance.randrange(1, 500), since=now), now, chance.random())
        if isinstance(decision, Dispatch):
            leases.append(decision.lease)
        elif isinstance(decision, Wait):
            tickets.append(decision.ticket)
        if tickets and chance.random() < 0.7:
            carry(r.cancel(tickets.pop(chance.randrange(len(tickets))), now))
            cancelled += 1
        if leases and chance.random() < 0.6:
            lease = leases.pop(chance.randrange(len(leases)))
            if chance.random() < 0.5:
                carry(r.started(lease, now))
            carry(r.release(lease, Outcome(End.CANCELLED), now))
            cancelled += 1
        ledger = r.fleet.instances["a"].ledger
        assert (ledger.own_slots, len(ledger.entries), r.waiting) == (len(leases), len(leases), len(tickets))
        assert 0 <= ledger.own_slots <= 8
    while leases:
        carry(r.release(leases.pop(), Outcome(End.CANCELLED), now))
    assert (r.waiting, ledger.entries, ledger.own_work, ledger.own_prompt) == (len(tickets), {}, 0, 0)
