"""Who waits and who goes next: late binding, fairness, split, degrading, aliases. All in virtual time."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from infermesh.errors import Reason
from registry.endpoint import Capacity, Endpoint, Hardware, Speed
from services.gateway.routing.admission import Bounds
from services.gateway.routing.decision import Decision, Dispatch, Effect, Lease, Refuse, Wait
from services.gateway.routing.degrade import DWELL_S, Switch
from services.gateway.routing.facts import End, Facts, Likeness, Member, Outcome
from services.gateway.routing.policy import Policy
from services.gateway.routing.router import Router

NOW = 100.0
DONE = Outcome(End.DONE)


def endpoint(id: str, tps: float = 1000, **more: object) -> Endpoint:
    given = {"kind": "llm", "host": "h", "port": 9, "model": "m", "incarnation": 1, **more}
    given.setdefault("speed", Speed(prefill_tps=tps, step_ms=20, prefill_doubling_ctx=1e9))
    return Endpoint(id=id, **given)  # type: ignore[arg-type]


def router(*endpoints: Endpoint, policy: Policy | None = None, bounds: Bounds | None = None) -> Router:
    made = Router(0.0, bounds, policy=policy)
    made.update([Member(e) for e in endpoints], 0.0)
    for e in endpoints:
        made.linked(e.id, e.incarnation, 0.0)
    return made


def facts(tokens: int = 100, **given: object) -> Facts:
    return Facts(**{"kind": "llm", "model": "m", "prompt_tokens": tokens, "max_tokens": 1, "since": NOW, **given})  # type: ignore[arg-type]


def ran(effects: list[Effect]) -> list[int]:
    return [effect.ticket for effect in effects if isinstance(effect, Dispatch)]


def drain(r: Router, decisions: list[Decision], now: float) -> list[tuple[int, Lease]]:
    """Runs everything to its end, a prompt at a time. Returns (ticket, lease) in the order of dispatch."""
    order = [(d.ticket, d.lease) for d in decisions if isinstance(d, Dispatch)]
    done = 0
    while done < len(order):
        lease = order[done][1]
        done += 1
        now += 0.1
        effects = r.started(lease, now) + r.release(lease, DONE, now) + r.tick(now)
        order += [(e.ticket, e.lease) for e in effects if isinstance(e, Dispatch)]
    return order


def test_an_instance_keeps_a_short_queue_and_the_gateway_keeps_the_rest() -> None:
    r = router(endpoint("a"))
    decisions = [r.pick(facts(), NOW) for _ in range(20)]
    sent = sum(isinstance(d, Dispatch) for d in decisions)
    assert 2 <= sent <= 5 and r.waiting == 20 - sent  # 0.1 s each, 0.3 s deep
    assert len(drain(r, decisions, NOW)) == 20 and r.waiting == 0


def test_time_alone_makes_room() -> None:
    r = router(endpoint("a"))
    r.pick(facts(1000), NOW)
    waits = r.pick(facts(), NOW)
    assert isinstance(waits, Wait)
    assert r.tick(NOW + 0.5) == []
    assert ran(r.tick(NOW + 0.85)) == [waits.ticket]  # 0.15 s of the first are left


def test_short_work_goes_first_and_cached_work_is_short() -> None:
    r = router(endpoint("a"))
    first = r.pick(facts(2000, chain=(1, 2), chain_share=0.5), NOW)
    assert isinstance(first, Dispatch)
    long = r.pick(facts(3000), NOW)
    short = r.pick(facts(200), NOW)
    cached = r.pick(facts(2000, chain=(1, 2), chain_share=0.5), NOW)
    tickets = [d.ticket for d in (cached, short, long) if isinstance(d, Wait)]
    assert [ticket for ticket, _ in drain(r, [first], NOW)] == [0, *tickets]


def test_a_prefix_is_kept_for_its_owner_until_that_costs_too_much() -> None:
    r = router(endpoint("a"), endpoint("b"))
    chain = {"chain": (1, 2), "chain_share": 0.5}
    first = r.pick(facts(2000, **chain), NOW)
    assert isinstance(first, Dispatch)
    r.release(first.lease, DONE, NOW + 2)
    owner = first.lease.instance_id
    busy = r.pick(facts(500, excluded=frozenset({"a", "b"} - {owner})), NOW + 2)
    assert isinstance(busy, Dispatch) and busy.lease.instance_id == owner
    r.pick(facts(100, excluded=frozenset({"a", "b"} - {owner})), NOW + 2)
    again = r.pick(facts(2000, **chain), NOW + 2)
    assert isinstance(again, Wait)  # 0.6 s for the owner, against 2 s of computing it elsewhere
    r.pick(facts(30_000, excluded=frozenset({"a", "b"} - {owner}), priority=1), NOW + 2)
    spilled = r.pick(facts(2000, chain=(1, 2), chain_share=0.5, since=NOW + 2), NOW + 2)
    assert isinstance(spilled, Dispatch | Wait)


def test_tenants_share_by_work_not_by_requests() -> None:
    r = router(endpoint("a"))
    head = r.pick(facts(400), NOW)
    who = {}
    for i in range(30):
        d = r.pick(facts(100, tenant="many", since=NOW + i / 1000), NOW)
        assert isinstance(d, Wait)
        who[d.ticket] = "many"
    for i in range(5):
        d = r.pick(facts(100, tenant="few", since=NOW + 1 + i / 1000), NOW)
        assert isinstance(d, Wait)
        who[d.ticket] = "few"
    order = [who[ticket] for ticket, _ in drain(r, [head], NOW) if ticket]
    assert order[:12].count("few") == 5, order


def test_between_tenants_neither_age_nor_an_own_priority_counts_but_a_reader_does() -> None:
    r = router(endpoint("a"))
    head = r.pick(facts(400, tenant="many"), NOW)
    who = {}
    for tenant, more in (
        ("many", {"priority": 100, "since": NOW - 5}),
        ("many", {"alike": Likeness("m", "", "", ""), "priority": 101}),
        ("few", {}),
    ):
        d = r.pick(facts(100, tenant=tenant, **{"since": NOW, **more}), NOW)
        assert isinstance(d, Wait)
        who[d.ticket] = (tenant, *more)
    order = [who[ticket] for ticket, _ in drain(r, [head], NOW) if ticket]
    assert order == [("many", "alike", "priority"), ("few",), ("many", "priority", "since")]


def test_a_queue_that_one_tenant_has_filled_takes_the_share_of_another() -> None:
    r = router(endpoint("a"), bounds=Bounds(max_requests=4))
    r.pick(facts(4000, tenant="many"), NOW)
    kinds = [type(r.pick(facts(4000, tenant=tenant), NOW)) for tenant in ("many",) * 5 + ("few",) * 3]
    assert kinds == [Wait] * 4 + [Refuse] + [Wait] * 2 + [Refuse], "twice the bound at most"


def test_a_split_holds_to_the_percent_while_requests_wait() -> None:
    fleet = [endpoint(f"a{i}", 4300, hardware=Hardware("A800-80G")) for i in range(4)]
    fleet += [endpoint(f"h{i}", 4000, hardware=Hardware("H20-96G")) for i in range(2)]
    r = router(*fleet, policy=Policy(split={"A800-80G": 6, "H20-96G": 4}), bounds=Bounds(max_requests=10_000))
    chance = random.Random(1)
    decisions = [r.pick(facts(chance.randrange(50, 2000)), NOW) for _ in range(2000)]
    tokens: Counter[str] = Counter()
    for _, lease in drain(r, decisions, NOW):
        tokens[lease.instance_id[0]] += lease.record.prompt_tokens
    assert abs(tokens["a"] / tokens.total() - 0.6) < 0.01, tokens


def test_a_split_leaves_an_idle_fleet_alone() -> None:
    fleet = [endpoint("a", hardware=Hardware("fast")), endpoint("b", 100, hardware=Hardware("slow"))]
    r = router(*fleet, policy=Policy(split={"fast": 1, "slow": 9}))
    for i in range(20):
        d = r.pick(facts(since=NOW + i), NOW + i)
        assert isinstance(d, Dispatch) and d.lease.instance_id == "a"
        r.release(d.lease, DONE, NOW + i + 0.2)


def test_degrading_needs_pressure_and_permission_and_is_flagged() -> None:
    fleet = (endpoint("a"), endpoint("small", model="s", tier="fallback"))
    r = router(*fleet, policy=Policy(ttft_s=2.0, fallbacks={"m": "s"}))
    calm = r.pick(facts(degrade=True), NOW)
    assert isinstance(calm, Dispatch) and calm.lease.record.degraded_from == ""
    for _ in range(4):
        r.pick(facts(1000), NOW)
    never = r.pick(facts(degrade=False, klass="bulk"), NOW)
    unasked = r.pick(facts(), NOW)
    assert isinstance(never, Wait) and isinstance(unasked, Wait)
    bulk = r.pick(facts(2000, klass="bulk"), NOW)
    asked = r.pick(facts(1500, degrade=True), NOW + 2.5)
    assert isinstance(bulk, Dispatch) and bulk.lease.instance_id == "small"
    assert isinstance(asked, Dispatch)
    assert (asked.lease.record.model, asked.lease.record.degraded_from) == ("s", "m")


def test_a_full_fallback_leaves_requests_with_their_own_model() -> None:
    small = endpoint("small", 10, model="s", capacity=Capacity(max_running=1))
    r = router(endpoint("a"), small, policy=Policy(fallbacks={"m": "s"}))
    r.pick(facts(5000, model="s"), NOW)
    for _ in range(4):
        r.pick(facts(1000), NOW)
    d = r.pick(facts(degrade=True, klass="bulk"), NOW)
    assert isinstance(d, Wait) and d.record.model == "m"


def test_those_who_wait_yield_too_when_the_pressure_comes_after_them() -> None:
    fleet = (endpoint("a"), endpoint("small", 1e6, model="s", tier="fallback"))
    r = router(*fleet, policy=Policy(ttft_s=2.0, fallbacks={"m": "s"}))
    r.pick(facts(1000), NOW)
    early = {}
    for klass, degrade in (("bulk", None), ("standard", True), ("core", True), ("bulk", False), ("standard", None)):
        d = r.pick(facts(klass=klass, degrade=degrade), NOW)
        assert isinstance(d, Wait)  # 1.5 s at most: no pressure yet
        early[d.ticket] = (klass, degrade)
    gone: list[tuple[str, bool | None]] = []
    for i in range(60):
        now = NOW + i / 50
        r.pick(facts(klass="core", since=now), now)  # a flood that does not yield
        newcomer = r.pick(facts(klass=("bulk", "standard", "core")[i % 3], degrade=True, since=now), now)
        if isinstance(newcomer, Wait):
            r.cancel(newcomer.ticket, now)
        gone += [early[e.ticket] for e in r.tick(now) if isinstance(e, Dispatch) and e.lease.record.degraded_from]
    assert gone == [("bulk", None), ("standard", True), ("core", True)]


def test_the_switch_has_hysteresis_and_a_dwell() -> None:
    switch, moves, was = Switch(), 0, False
    for i in range(1200):  # a square wave of 1 s over two minutes, and noise around both thresholds
        on = switch.move(2.1 if i // 10 % 2 else 0.9, 2.0, i / 10)
        moves += on is not was
        was = on
    assert moves <= 120 / DWELL_S
    steady = Switch()
    assert not steady.move(1.9, 2.0, 0.0) and steady.move(2.1, 2.0, 1.0)
    assert steady.move(1.5, 2.0, 10.0) and not steady.move(0.9, 2.0, 11.0)


def test_weighted_aliases_are_sticky_for_a_session_and_skip_what_is_not_there() -> None:
    policy = Policy(aliases={"chat": (("m", 95.0), ("v2", 5.0)), "beta": (("gone", 99.0), ("v2", 1.0))})
    r = router(endpoint("a", 1e6), endpoint("b", 1e6, model="v2"), policy=policy)
    got: Counter[str] = Counter()
    for i in range(2000):
        d = r.pick(facts(model="chat", session_id=f"s{i}"), NOW + i, draw=i / 2000)
        twin = r.pick(facts(model="chat", session_id=f"s{i}"), NOW + i, draw=0.99)
        assert isinstance(d, Dispatch) and isinstance(twin, Dispatch)
        assert d.lease.instance_id == twin.lease.instance_id
        got[d.lease.record.model] += 1
        for lease in (d.lease, twin.lease):
            r.release(lease, DONE, NOW + i)
    assert 0.035 < got["v2"] / got.total() < 0.065, got
    skipped = r.pick(facts(model="beta"), NOW + 9000, draw=0.0)
    assert isinstance(skipped, Dispatch) and skipped.lease.record.model == "v2"


def test_who_can_be_on_time_goes_before_who_cannot_and_the_overdue_have_a_share() -> None:
    r = router(endpoint("a"), policy=Policy(ttft_s=2.0), bounds=Bounds(max_wait_s=30))
    head = r.pick(facts(30_000), NOW)  # 30 s of prompt: everybody waits
    assert isinstance(head, Dispatch)
    old = [r.pick(facts(since=NOW + i / 10), NOW + i / 10) for i in range(6)]
    r.tick(NOW + 20)  # they are late, and overdue: more than half of the longest wait
    new = [r.pick(facts(since=NOW + 20 + i / 10), NOW + 20) for i in range(6)]
    names = {d.ticket: "old" for d in old if isinstance(d, Wait)} | {
        d.ticket: "new" for d in new if isinstance(d, Wait)
    }
    order = [names[ticket] for ticket, _ in drain(r, [head], NOW + 20) if ticket]
    assert order.count("new") == order.count("old") == 6
    assert order[:8].count("new") == 6, order  # the old ones have every fourth place until then
    assert order[8:] == ["old"] * 4


def test_a_prompt_too_long_for_anybody_is_asked_about_at_once_and_holds_nobody_up() -> None:
    fleet = [endpoint(name, capacity=Capacity(context_max=8192)) for name in "ab"]
    r = router(*fleet)
    for _ in range(8):
        r.pick(facts(1000), NOW)
    asked = r.pick(facts(500_000), NOW)  # an estimate: the instance counts, and refuses without computing anything
    assert isinstance(asked, Dispatch) and asked.lease.instance_id in "ab"
    r.release(asked.lease, Outcome(End.REFUSED, Reason.OUT_OF_RANGE, prompt_tokens=480_000), NOW)
    exact = facts(480_000, counted=True, excluded=frozenset({asked.lease.instance_id}))
    refused = r.pick(exact, NOW)
    assert isinstance(refused, Refuse) and refused.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    assert "480000 tokens" in refused.message and r.waiting == 6


@pytest.mark.parametrize(
    ("allowed", "degrades"),
    [
        ((), True),
        (("m",), False),
        (("m", "s"), True),
        (("m", "tiny"), True),
        (("m", "beta"), True),
        (("m", "x"), False),
    ],
)
def test_a_degrade_never_reaches_a_model_that_the_key_may_not_use(allowed: tuple[str, ...], degrades: bool) -> None:
    """By its id, by an alias of its own, or behind a weighted alias of the key; else it stays where it is."""
    policy = Policy(ttft_s=2.0, fallbacks={"m": "s"}, aliases={"beta": (("s", 1.0),), "x": (("m", 1.0),)})
    r = router(endpoint("a"), endpoint("small", model="s", aliases=("tiny",)), policy=policy)
    for _ in range(3):
        r.pick(facts(8000), NOW)
    found = r.pick(facts(1500, degrade=True, allowed=allowed), NOW + 2.5)
    served = found.lease.record.model if isinstance(found, Dispatch) else "m"
    assert served == ("s" if degrades else "m"), found
