"""The ledger returns to exactly zero, whatever happens in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.endpoint import Capacity, Endpoint
from services.gateway.routing.admission import Bounds
from services.gateway.routing.decision import Close, Dispatch, Effect, Lease, Refuse, Wait
from services.gateway.routing.facts import End, Facts, LoadReport, Member, Outcome
from services.gateway.routing.ledger import US, Entry, Ledger
from services.gateway.routing.router import Router

NAMES = ("a", "b", "c")


def test_reconciliation_counts_arrived_prompts_as_reported_and_the_wire_in_full() -> None:
    ledger = Ledger()
    for seq in (1, 2, 3):
        ledger.reserve(seq, Entry(prompt=100, work=US, output=10, slots=1, total=100), 0.0)
    report = LoadReport(running=5, waiting=1, queued_tokens=130, seen_seq=2, own_running=2, own_queued_tokens=80)
    ledger.reconcile(report, 0.5, tps=100)
    assert (ledger.foreign_running, ledger.foreign_prompt) == (4, 50)
    assert ledger.own_prompt == 80 + 100  # 1 and 2 have 80 left to compute; 3 is on the wire
    assert ledger.prompt_tokens() == 230
    assert ledger.wait_s(0.5) == pytest.approx(0.8 + 1.0 + 0.5)
    assert ledger.wait_s(0.7) == pytest.approx(2.1)  # the head of the line progresses with the clock
    for seq in (3, 1, 2):
        assert ledger.release(seq, 1.0)
    assert not ledger.release(2, 1.0)
    assert (ledger.own_prompt, ledger.own_work, ledger.own_output, ledger.own_slots) == (0, 0, 0, 0)


def test_the_head_of_the_line_never_progresses_beyond_its_own_end() -> None:
    ledger = Ledger()
    ledger.reserve(1, Entry(prompt=2000, work=US, output=10, slots=1, total=2000), 0.0)
    ledger.reserve(2, Entry(prompt=2000, work=US, output=10, slots=1, total=2000), 0.0)
    assert ledger.wait_s(0.25) == 1.75
    assert ledger.wait_s(9.0) == 1.0  # the engine is slower than thought: the second has not begun
    ledger.started(1, 9.0)
    assert ledger.wait_s(9.0) == 1.0
    assert ledger.wait_s(9.5) == 0.5


def test_small_prompts_share_a_step_and_progress_together() -> None:
    ledger = Ledger()
    for seq in range(1, 4):
        ledger.reserve(seq, Entry(prompt=700, work=US, output=10, slots=1, total=700), 0.0)
    assert ledger.wait_s(1.5) == 1.5
    assert ledger.wait_s(9.0) == 1.0  # two of 700 tokens fit into a step of 2,048, the third begins with the next
    ledger.reserve(4, Entry(prompt=5000, work=US, output=10, slots=1, total=5000), 9.0)
    ledger.started(1, 9.0)
    ledger.started(2, 9.0)
    assert ledger.wait_s(99.0) == 1.0


def test_unknown_numbers_leave_what_is_known() -> None:
    ledger = Ledger()
    ledger.reserve(1, Entry(prompt=100, work=US, output=10, slots=1, total=100), 0.0)
    ledger.reconcile(LoadReport(seen_seq=1), 0.0, tps=100)
    assert (ledger.own_prompt, ledger.foreign_running) == (100, 0)


_step = st.one_of(
    st.tuples(st.just("pick"), st.integers(1, 500), st.integers(0, 300)),
    st.tuples(st.just("release"), st.integers(0, 50), st.sampled_from(list(End))),
    st.tuples(st.just("started"), st.integers(0, 50), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 50), st.just(0)),
    st.tuples(st.just("report"), st.integers(0, 2), st.integers(0, 400)),
    st.tuples(st.just("tick"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("link"), st.integers(0, 2), st.booleans()),
    st.tuples(st.just("reborn"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("listed"), st.integers(0, 7), st.just(0)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_step, max_size=80))
def test_after_random_picks_cancels_losses_and_re_registrations_nothing_is_left(steps: list[tuple]) -> None:
    lives = dict.fromkeys(NAMES, 1)

    def members(mask: int = 7) -> list[Member]:
        return [
            Member(Endpoint(n, "llm", "127.0.0.1", 9, "m", lives[n], capacity=Capacity(max_running=2)))
            for i, n in enumerate(NAMES)
            if mask & 1 << i
        ]

    router = Router(0.0, Bounds(max_requests=5, max_wait_s=3))
    now = 100.0
    router.update(members(), now)
    for n in NAMES:
        router.linked(n, 1, now)
    leases: list[Lease] = []
    tickets: list[int] = []

    def carry(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Dispatch | Refuse):
                tickets.remove(effect.ticket)  # each ticket is answered once, and only while it waits
            if isinstance(effect, Dispatch):
                leases.append(effect.lease)
            if isinstance(effect, Close):  # never while work of ours runs there
                life = (effect.instance_id, effect.incarnation)
                assert all((lease.instance_id, lease.incarnation) != life for lease in leases)

    for what, a, b in steps:
        if what == "pick":
            decision = router.pick(Facts("llm", "m", prompt_tokens=a, max_tokens=b, since=now), now)
            if isinstance(decision, Dispatch):
                leases.append(decision.lease)
            elif isinstance(decision, Wait):
                tickets.append(decision.ticket)
        elif what == "release" and leases:
            lease = leases.pop(a % len(leases))
            carry(router.release(lease, Outcome(b), now))
            assert router.release(lease, Outcome(b), now) == []
        elif what == "started" and leases:
            carry(router.started(leases[a % len(leases)], now))
        elif what == "cancel" and tickets:
            carry(router.cancel(tickets.pop(a % len(tickets)), now))
        elif what == "report":
            n = NAMES[a]
            load = LoadReport(running=a, queued_tokens=b, seen_seq=b, own_running=a, own_queued_tokens=b // 2)
            carry(router.report(n, lives[n], load, now))
        elif what == "tick":
            now += a
            carry(router.tick(now))
        elif what == "link":
            n = NAMES[a]
            carry(router.linked(n, lives[n], now) if b else router.unlinked(n, lives[n], "x", now))
        elif what == "reborn":
            lives[NAMES[a]] += 1
            carry(router.update(members(), now))
        elif what == "listed":
            carry(router.update(members(a), now))
        for instance in router.fleet.instances.values():
            assert instance.ledger.own_slots <= 2
    while leases or tickets:
        while leases:
            carry(router.release(leases.pop(), Outcome(End.CANCELLED), now))
        now += 10
        carry(router.tick(now))
    for instance in router.fleet.instances.values():
        ledger = instance.ledger
        assert (ledger.entries, ledger.pending, instance.line.count) == ({}, {}, 0)
        assert (ledger.own_prompt, ledger.own_work, ledger.own_output, ledger.own_slots) == (0, 0, 0, 0)
    assert router.fleet.leaving == {} and router.waiting == 0
