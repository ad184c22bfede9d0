"""The router as a whole: decisions, reservations, effects. Everything here is arithmetic; no clock, no loop."""

from __future__ import annotations

import pytest

from infermesh.errors import Reason
from registry.endpoint import Capacity, Speed
from services.gateway.routing import cost
from services.gateway.routing.admission import Bounds
from services.gateway.routing.decision import Dispatch, Refuse, Wait
from services.gateway.routing.facts import End, LoadReport, Member, Outcome
from services.gateway.routing.router import Router
from tests.kit.routing import DONE, OLD, endpoint, facts, pick, router


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
        "preempt": 0,
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


def test_those_who_can_go_nowhere_do_not_hide_those_who_can() -> None:
    """Two hundred long prompts wait for the one instance that takes them; the small one is not idle meanwhile."""
    long, short = Capacity(context_max=100_000, max_running=1), Capacity(context_max=1000, max_running=1)
    r = router(endpoint("big", capacity=long), endpoint("small", capacity=short))
    pick(r, prompt_tokens=20_000, counted=True)
    held = pick(r, counted=True).lease
    assert held.instance_id == "small"
    for _ in range(200):
        assert isinstance(r.pick(facts(prompt_tokens=20_000, counted=True), OLD), Wait)
    waiting = r.pick(facts(counted=True), OLD)
    assert isinstance(waiting, Wait)
    effects = r.release(held, DONE, OLD + 1)
    for step in range(10):
        effects += r.tick(OLD + 1 + step / 20)
    assert [(e.ticket, e.lease.instance_id) for e in effects] == [(waiting.ticket, "small")]  # type: ignore[union-attr]
    assert r.waiting == 200


def test_room_goes_to_those_who_asked_by_an_alias_too() -> None:
    r = router(endpoint("a", running=1, aliases=("gpt",)))
    held = pick(r, model="gpt").lease
    waiting = r.pick(facts(model="gpt"), OLD)
    assert isinstance(waiting, Wait)
    assert [e.ticket for e in r.release(held, DONE, OLD + 1)] == [waiting.ticket]  # type: ignore[union-attr]
