"""The router as a whole: decisions, reservations, effects. Everything here is arithmetic; no clock, no loop."""

from __future__ import annotations

import pytest

from infermesh.errors import Reason
from registry.endpoint import Capacity, Endpoint, Speed
from services.gateway.routing import cost
from services.gateway.routing.admission import Bounds
from services.gateway.routing.decision import Close, Dispatch, Eject, Probe, Refuse, Wait
from services.gateway.routing.facts import End, Facts, LoadReport, Member, Outcome
from services.gateway.routing.router import Router

OLD = 100.0  # a moment at which the gateway is no longer young
DONE = Outcome(End.DONE)


def endpoint(id: str, *, tps: float = 1000, step: float = 20, running: int = 0, **more: object) -> Endpoint:
    given = {"kind": "llm", "host": "127.0.0.1", "port": 9, "model": "m", "incarnation": 1, **more}
    given.setdefault("speed", Speed(prefill_tps=tps, step_ms=step))
    given.setdefault("capacity", Capacity(max_running=running))
    return Endpoint(id=id, **given)  # type: ignore[arg-type]


def router(*endpoints: Endpoint, bounds: Bounds | None = None, weights: dict[str, float] | None = None) -> Router:
    made = Router(0.0, bounds, weights)
    made.update([Member(e) for e in endpoints], 0.0)
    for e in endpoints:
        made.linked(e.id, e.incarnation, 0.0)
    return made


def facts(**given: object) -> Facts:
    return Facts(**{"kind": "llm", "model": "m", "prompt_tokens": 100, "max_tokens": 50, "since": OLD, **given})  # type: ignore[arg-type]


def pick(r: Router, now: float = OLD, draw: float = 0.0, **given: object) -> Dispatch:
    decision = r.pick(facts(**given), now, draw)
    assert isinstance(decision, Dispatch), decision
    return decision


def burst(r: Router, count: int, **given: object) -> dict[str, int]:
    """Where `count` requests of one moment are or stand. Nothing starts meanwhile, and no report comes."""
    for _ in range(count):
        r.pick(facts(**given), OLD)
    return {i.id: i.ledger.own_slots + i.line.count for i in r.fleet.instances.values()}


def test_a_burst_of_200_spreads_by_speed() -> None:
    """Cards of speed 4 : 2 : 1 : 1 get 100, 50, 25 and 25 of 200 equal requests."""
    r = router(*(endpoint(name, tps=1000 * f, step=20 / f) for name, f in (("a", 4), ("b", 2), ("c", 1), ("d", 1))))
    got = burst(r, 200)
    assert {name: abs(got[name] - want) <= 4 for name, want in (("a", 100), ("b", 50), ("c", 25), ("d", 25))} == (
        dict.fromkeys("abcd", True)
    ), got


def test_static_weights_multiply_in() -> None:
    r = router(endpoint("a", weight=3.0), endpoint("b"), weights={"b": 1.5})
    got = burst(r, 300)
    assert abs(got["a"] - 200) <= 4, got  # 3 : 1.5


def test_an_unknown_speed_is_a_prior_not_zero_and_not_infinite() -> None:
    r = router(endpoint("a", speed=Speed()), endpoint("b", tps=2000, step=40))
    assert abs(burst(r, 100)["a"] - 50) <= 2


def test_one_long_prompt_weighs_as_much_as_many_short_ones() -> None:
    r = router(endpoint("a"), endpoint("b"))
    assert pick(r, prompt_tokens=10_000).lease.instance_id == "a"
    assert burst(r, 20) == {"a": 1, "b": 20}


def test_equal_costs_are_decided_by_the_draw() -> None:
    ids = [pick(router(endpoint("a"), endpoint("b"), endpoint("c")), draw=d).lease.instance_id for d in (0, 0.4, 0.99)]
    assert ids == ["a", "b", "c"]


def test_same_inputs_same_decisions() -> None:
    def run() -> list[str]:
        r = router(endpoint("a"), endpoint("b", tps=700), endpoint("c", tps=300))
        said = []
        for i in range(100):
            decision = r.pick(facts(prompt_tokens=i % 13 * 50 + 1), OLD + i / 10, (i * 7 % 10) / 10)
            said.append(repr(decision))
            if i % 3 == 0 and isinstance(decision, Dispatch):
                said.append(repr(r.started(decision.lease, OLD + i / 10)))
            said.append(repr(r.tick(OLD + i / 10)))
        return said

    assert run() == run()


def test_the_record_tells_candidates_terms_and_rejected() -> None:
    r = router(endpoint("a"), endpoint("b", tps=500), endpoint("c", capacity=Capacity(context_max=64)))
    record = pick(r).lease.record
    assert [c.id for c in record.candidates] == ["a", "b"]
    assert record.rejected == (("c", "context_over"),)
    assert (record.chosen, record.reason) == ("a", "least_cost")
    chosen = record.candidates[0]
    terms = dict(chosen.terms)
    prefill = 100 / 1000 * (1 + 50 / 50_000)
    step = 0.02 + 100 * 30e-9
    assert terms == {
        "wait": 0,
        "line": 0,
        "room": 0,
        "reserve": 0,
        "prefill": pytest.approx(prefill),
        "decode": pytest.approx(cost.DECODE_SHARE * 50 * step),
    }
    assert record.predicted_ttft_s == pytest.approx(prefill + step)
    assert record.estimate_s == pytest.approx(sum(v for _, v in chosen.terms) / chosen.weight)
    assert r.explain(facts(), OLD) != record  # the work just reserved shows


def test_explain_reserves_nothing() -> None:
    r = router(endpoint("a"))
    assert r.explain(facts(), OLD) == r.explain(facts(), OLD)
    assert r.fleet.instances["a"].ledger.entries == {}


def test_full_instances_make_a_request_wait_until_a_release() -> None:
    r = router(endpoint("a", running=1), endpoint("b", running=1))
    held = [pick(r), pick(r)]
    waiting = r.pick(facts(), OLD)
    assert isinstance(waiting, Wait)
    assert waiting.record.rejected == (("a", "no_room"), ("b", "no_room"))
    effects = r.release(held[1].lease, DONE, OLD + 1)
    assert [(e.ticket, e.lease.instance_id, e.lease.record.waited_s) for e in effects] == [(waiting.ticket, "b", 1.0)]
    assert r.release(held[0].lease, DONE, OLD + 1) == []


def test_foreign_work_fills_an_instance_and_a_report_empties_it() -> None:
    r = router(endpoint("a", running=4))
    r.report("a", 1, LoadReport(running=4, waiting=0), OLD)
    waiting = r.pick(facts(), OLD)
    assert isinstance(waiting, Wait)
    effects = r.report("a", 1, LoadReport(running=3, waiting=0), OLD + 0.1)
    assert [type(e) for e in effects] == [Dispatch]


def test_own_work_in_a_report_is_not_counted_twice() -> None:
    r = router(endpoint("a", running=4, tps=4000))
    leases = [pick(r).lease for _ in range(3)]
    r.report("a", 1, LoadReport(running=3, waiting=0, own_running=3, seen_seq=leases[-1].seq), OLD)
    ledger = r.fleet.instances["a"].ledger
    assert (ledger.running(), ledger.foreign_running) == (3, 0)
    assert isinstance(r.pick(facts(), OLD), Dispatch)


def test_priority_class_and_age_order_the_queue() -> None:
    r = router(endpoint("a", running=1))
    held = pick(r).lease
    asked = [("bulk", 100), ("standard", 0), ("standard", 5), ("core", 0), ("standard", 0)]
    tickets = {}
    for i, (klass, priority) in enumerate(asked):
        decision = r.pick(facts(klass=klass, priority=priority, since=OLD + i), OLD + i)
        assert isinstance(decision, Wait)
        tickets[decision.ticket] = i
    order = []
    for _ in asked:
        (effect,) = r.release(held, DONE, OLD + 10)
        assert isinstance(effect, Dispatch)
        order.append(tickets[effect.ticket])
        held = effect.lease
    assert order == [3, 2, 1, 4, 0]


def test_a_waiting_request_that_does_not_fit_holds_nobody_up() -> None:
    small = endpoint("small", tps=9000, capacity=Capacity(max_running=1, context_max=1000))
    large = endpoint("large", tps=9000, capacity=Capacity(max_running=1, context_max=9000))
    r = router(small, large)
    held = {pick(r).lease.instance_id: None, (second := pick(r)).lease.instance_id: None}
    assert set(held) == {"small", "large"}
    on_small = second.lease if second.lease.instance_id == "small" else None
    long = r.pick(facts(prompt_tokens=5000), OLD)
    short = r.pick(facts(), OLD + 1)
    assert isinstance(long, Wait) and isinstance(short, Wait) and on_small is not None
    (effect,) = r.release(on_small, DONE, OLD + 2)
    assert isinstance(effect, Dispatch) and effect.ticket == short.ticket


def test_queue_bounds_refuse_with_a_retry_delay() -> None:
    r = router(endpoint("a", running=1), bounds=Bounds(max_requests=2, max_tokens=1000, max_wait_s=5))
    pick(r)
    assert isinstance(r.pick(facts(), OLD), Wait)
    heavy = r.pick(facts(prompt_tokens=2000), OLD)
    assert isinstance(heavy, Refuse) and heavy.reason is Reason.QUEUE_FULL and "tokens" in heavy.message
    assert isinstance(r.pick(facts(), OLD), Wait)
    full = r.pick(facts(), OLD)
    assert isinstance(full, Refuse) and full.reason is Reason.QUEUE_FULL and full.retry_after_s is not None
    assert r.tick(OLD + 4.9) == []
    late = r.tick(OLD + 5)
    assert [(type(e), e.reason) for e in late] == [(Refuse, Reason.QUEUE_TIMEOUT)] * 2  # type: ignore[union-attr]
    assert r.waiting == 0


def test_a_full_model_refuses_only_its_own_requests() -> None:
    r = router(endpoint("a", running=1), endpoint("b", model="other"), bounds=Bounds(max_requests=0))
    pick(r)
    assert isinstance(r.pick(facts(), OLD), Refuse)
    assert pick(r, model="other").lease.instance_id == "b"


def test_the_deadline_ends_a_wait() -> None:
    r = router(endpoint("a", running=1))
    pick(r)
    assert isinstance(r.pick(facts(deadline=OLD + 1), OLD), Wait)
    (effect,) = r.tick(OLD + 1)
    assert isinstance(effect, Refuse) and effect.reason is Reason.DEADLINE_EXCEEDED


def test_a_cancelled_ticket_is_never_dispatched() -> None:
    r = router(endpoint("a", running=1))
    held = pick(r).lease
    waiting = r.pick(facts(), OLD)
    assert isinstance(waiting, Wait)
    assert r.cancel(waiting.ticket, OLD) == []
    assert r.release(held, DONE, OLD) == []
    assert r.fleet.instances["a"].ledger.entries == {}


def test_unknown_model_and_known_model_without_instances() -> None:
    r = router(endpoint("a"))
    unknown = r.pick(facts(model="nope"), OLD)
    assert isinstance(unknown, Refuse) and unknown.reason is Reason.MODEL_NOT_FOUND
    wrong_kind = r.pick(facts(kind="embedding"), OLD)
    assert isinstance(wrong_kind, Refuse) and "kind llm" in wrong_kind.message
    r.unlinked("a", 1, "broken", OLD)
    lost = r.pick(facts(), OLD)
    assert isinstance(lost, Refuse) and lost.reason is Reason.NO_INSTANCE
    r.update([], OLD)
    gone = r.pick(facts(), OLD)
    assert isinstance(gone, Refuse) and gone.reason is Reason.NO_INSTANCE


def test_an_empty_directory_just_after_start_makes_requests_wait() -> None:
    r = Router(OLD)
    first = r.pick(facts(), OLD)
    never = r.pick(facts(model="never"), OLD + 0.5)
    assert isinstance(first, Wait) and isinstance(never, Wait)
    r.update([Member(endpoint("a"))], OLD + 1)
    (effect,) = r.linked("a", 1, OLD + 1.1)
    assert isinstance(effect, Dispatch) and effect.ticket == first.ticket
    (refused,) = r.tick(OLD + 3.6)
    assert isinstance(refused, Refuse)
    assert (refused.ticket, refused.reason) == (never.ticket, Reason.MODEL_NOT_FOUND)


def test_a_young_registry_makes_requests_wait_too() -> None:
    r = Router(0.0)
    r.update([], OLD, young=True)
    assert isinstance(r.pick(facts(), OLD), Wait)
    r.update([], OLD + 1, young=False)
    assert isinstance(r.pick(facts(), OLD + 1), Refuse)


def test_aliases_and_features_and_exclusion() -> None:
    r = router(
        endpoint("a", aliases=("nick",), features=frozenset({"n"})), endpoint("b", features=frozenset({"tools"}))
    )
    assert pick(r, model="nick").lease.instance_id == "a"
    assert pick(r, features=frozenset({"tools"})).lease.instance_id == "b"
    none = r.pick(facts(features=frozenset({"grammar"})), OLD)
    assert isinstance(none, Refuse) and none.reason is Reason.UNSUPPORTED and "grammar" in none.message
    assert pick(r, excluded=frozenset({"a"})).lease.instance_id == "b"
    assert isinstance(r.pick(facts(excluded=frozenset({"a", "b"})), OLD), Refuse)


def test_context_ranges() -> None:
    narrow = endpoint("narrow", capacity=Capacity(context_max=4096))
    wide = endpoint("wide", tps=900, capacity=Capacity(context_min=1000, context_max=32768))
    r = router(narrow, wide)
    assert pick(r).lease.instance_id == "narrow"
    first = pick(r, prompt_tokens=3700)
    assert first.lease.instance_id == "wide"  # near the edge an estimate takes the larger range
    assert pick(r, OLD + 1, prompt_tokens=3700, counted=True).lease.instance_id == "narrow"
    r.started(first.lease, OLD)
    over = pick(r, prompt_tokens=50_000)  # nobody fits: the widest gives the exact refusal
    assert over.lease.instance_id == "wide"


def test_suspects_serve_only_when_nobody_is_healthy() -> None:
    r = router(endpoint("a"), endpoint("b"))
    r.update([Member(endpoint("a"), passing=False), Member(endpoint("b"))], OLD)
    assert {pick(r).lease.instance_id for _ in range(2)} == {"b"}
    r.unlinked("b", 1, "broken", OLD)
    assert pick(r).lease.instance_id == "a"


def test_a_lost_call_makes_suspect_and_asks_for_a_probe() -> None:
    r = router(endpoint("a"), endpoint("b"))
    lease = pick(r).lease
    effects = r.release(lease, Outcome(End.LOST, Reason.INSTANCE_LOST), OLD)
    assert effects == [Probe("a")]
    assert pick(r).lease.instance_id == "b"
    r.probed("a", 1, True, OLD)
    assert r.fleet.instances["a"].state.value == "healthy"
    r.probed("a", 1, False, OLD)
    assert r.fleet.instances["a"].state.value == "lost"


def test_killed_and_unregistered_is_gone_and_its_channel_closes_after_the_last_lease() -> None:
    r = router(endpoint("a"), endpoint("b"))
    lease = pick(r).lease
    assert lease.instance_id == "a"
    r.update([Member(endpoint("a"), passing=False), Member(endpoint("b"))], OLD)
    assert "a" in r.fleet.instances  # the registry alone does not remove it while its Link stands
    assert r.unlinked("a", 1, "reset", OLD) == [Eject("a", "reset")]
    assert "a" not in r.fleet.instances
    assert r.release(lease, Outcome(End.LOST, Reason.INSTANCE_LOST), OLD)[-1] == Close("a", 1)


def test_a_wiped_registry_keeps_linked_instances_for_a_while() -> None:
    r = router(endpoint("a"))
    r.update([], OLD)
    assert pick(r).lease.instance_id == "a"
    assert r.fleet.instances["a"].state.value == "suspect"
    r.update([Member(endpoint("a"))], OLD + 5)
    assert r.fleet.instances["a"].state.value == "healthy"
    r.update([], OLD + 10)
    r.tick(OLD + 41)
    assert r.fleet.instances == {}


def test_a_stale_directory_removes_nobody() -> None:
    r = router(endpoint("a"))
    r.update([], OLD, stale=True)
    assert r.fleet.instances["a"].state.value == "healthy"


def test_re_sync_keeps_the_ledger_and_a_new_life_resets_it() -> None:
    r = router(endpoint("a"))
    lease = pick(r).lease
    r.update([Member(endpoint("a", weight=2.0))], OLD)
    kept = r.fleet.instances["a"]
    assert list(kept.ledger.entries) == [lease.seq] and kept.rates.weight == 2.0
    effects = r.update([Member(endpoint("a", incarnation=2))], OLD)
    assert [type(e) for e in effects] == [Eject]  # its lease is still out
    assert r.fleet.instances["a"].ledger.entries == {}
    assert r.release(lease, DONE, OLD) == [Close("a", 1)]
    assert r.fleet.instances["a"].ledger.own_prompt == 0


def test_draining_and_goodbye() -> None:
    r = router(endpoint("a"), endpoint("b"))
    assert r.draining("a", 1, OLD) == [Eject("a", "draining")]
    assert {pick(r).lease.instance_id for _ in range(2)} == {"b"}
    r.goodbye("a", 1, OLD)
    assert set(r.fleet.instances) == {"b"}


def test_full_refusal_pauses_an_instance_and_the_tick_resumes_it() -> None:
    r = router(endpoint("a"))
    lease = pick(r).lease
    r.release(lease, Outcome(End.REFUSED, Reason.INSTANCE_FULL), OLD)
    again = r.pick(facts(), OLD)
    assert isinstance(again, Wait)
    assert r.tick(OLD + 0.05) == []
    (effect,) = r.tick(OLD + 0.11)
    assert isinstance(effect, Dispatch)


def test_losing_every_instance_refuses_those_who_wait() -> None:
    r = router(endpoint("a", running=1))
    pick(r)
    waiting = r.pick(facts(), OLD)
    assert isinstance(waiting, Wait)
    effects = r.unlinked("a", 1, "reset", OLD)
    assert [type(e) for e in effects] == [Eject, Refuse]
    assert effects[1].ticket == waiting.ticket and effects[1].reason is Reason.NO_INSTANCE  # type: ignore[union-attr]


def test_prompt_tokens_are_learned_from_usage() -> None:
    r = router(endpoint("a"))
    given = facts(prompt_tokens=0, prompt_bytes=1000)
    assert r.estimate(given)[0] == 250
    for _ in range(200):
        d = r.pick(given, OLD)
        assert isinstance(d, Dispatch)
        r.release(d.lease, Outcome(End.DONE, None, 500, 20), OLD)
    assert abs(r.estimate(given)[0] - 500) <= 5
    assert abs(r.estimate(facts(max_tokens=0))[1] - 20) <= 2
