"""A gateway knows who overtakes whom in an instance: its ledger's order, its choice, and what it learns."""

from __future__ import annotations

import pytest

from registry.endpoint import Endpoint, Speed
from services.chassis.prompt_line import US
from services.gateway.routing import cost
from services.gateway.routing.decision import Dispatch, Wait
from services.gateway.routing.facts import End, Facts, Likeness, LoadReport, Member, Outcome
from services.gateway.routing.ledger import Entry, Ledger
from services.gateway.routing.policy import Policy
from services.gateway.routing.router import Router

S = US


def entry(seconds: float, **fields: int) -> Entry:
    tokens = round(1000 * seconds)
    return Entry(prompt=tokens, work=round(seconds * S), output=10, slots=1, total=tokens, **fields)


def test_a_ledger_keeps_the_order_of_its_instance() -> None:
    ledger = Ledger(preempts=True)
    ledger.reserve(1, entry(40, patience=40 * S), 0.0)
    behind = ledger.overtaken(S, 0, 10.0)
    assert ledger.wait_s(10.0, behind) == 0.0 and ledger.wait_s(10.0) == 30.0
    ledger.reserve(2, entry(1), 10.0)
    assert list(ledger.pending) == [2, 1] and ledger.wait_s(10.5) == pytest.approx(30.5)
    assert ledger.entries[1].patience == 39 * S
    ledger.started(2, 11.0)
    assert ledger.wait_s(21.0) == pytest.approx(20.0)
    ledger.release(1, 22.0)
    ledger.release(2, 22.0)
    assert (ledger.own_prompt, ledger.own_work) == (0, 0)


def test_who_goes_away_at_the_end_of_the_line_does_not_make_its_head_begin_anew() -> None:
    ledger = Ledger()
    for seq in (1, 2, 3):
        ledger.reserve(seq, entry(40), 0.0)
    ledger.release(3, 10.0)
    assert ledger.wait_s(10.0) == 70.0


def test_what_the_instance_says_is_computed_stands_in_nobodys_way() -> None:
    ledger = Ledger(preempts=True)
    ledger.reserve(1, entry(1), 0.0)
    ledger.reserve(2, entry(40, patience=40 * S), 0.0)
    ledger.reconcile(LoadReport(queued_tokens=40_000, seen_seq=2, own_running=2, own_queued_tokens=40_000), 1.0, 1000.0)
    assert list(ledger.pending) == [2]
    ledger.reserve(3, entry(1), 11.0)
    assert list(ledger.pending) == [3, 2] and ledger.wait_s(11.0) == pytest.approx(31.0)
    for seq in (1, 2, 3):
        ledger.release(seq, 12.0)
    assert (ledger.own_prompt, ledger.own_work, len(ledger.pending)) == (0, 0, 0)


def test_work_without_tokens_is_given_back_too() -> None:
    ledger = Ledger()
    ledger.reserve(1, Entry(prompt=0, work=S, output=0, slots=1), 0.0)
    ledger.reserve(2, entry(1), 0.0)
    ledger.reconcile(LoadReport(queued_tokens=0, seen_seq=2, own_running=2, own_queued_tokens=0), 1.0, 1000.0)
    for seq in (1, 2):
        ledger.release(seq, 2.0)
    assert (ledger.own_prompt, ledger.own_work, len(ledger.pending)) == (0, 0, 0)


def router(*, preempts: bool) -> Router:
    made = Router(-60.0, policy=Policy(ttft_s=5.0))
    speed = Speed(prefill_tps=1000.0, prefill_doubling_ctx=1e9, step_ms=10.0)
    endpoint = Endpoint(id="a", kind="llm", host="h", port=1, model="m", incarnation=1, speed=speed)
    made.update([Member(endpoint)], 0.0)
    made.linked("a", 1, 0.0, grants=True, preempts=preempts)
    return made


def facts(tokens: int, **fields: object) -> Facts:
    return Facts("llm", "m", prompt_tokens=tokens, counted=True, max_tokens=10, **fields)  # type: ignore[arg-type]


def test_a_short_prompt_is_sent_where_it_overtakes_and_waits_where_it_cannot() -> None:
    able, unable = router(preempts=True), router(preempts=False)
    for each in (able, unable):
        sent = each.pick(facts(60_000), 0.0)
        assert isinstance(sent, Dispatch) and sent.lease.patience_us == sent.lease.work_us > 0
    decision = able.pick(facts(1000), 10.0)
    assert isinstance(decision, Dispatch)
    terms = dict(decision.lease.record.candidates[0].terms)
    assert 0 < terms["wait"] < 3, "half of the step that runs"
    later, beside = (
        1.0,
        cost.BESIDE_SHARE * 10 * 2.048,
    )  # the long one; ten tokens, each in a step of 2,048 of its prompt
    assert terms["preempt"] == pytest.approx(later + beside, rel=0.01)
    assert isinstance(unable.pick(facts(1000), 10.0), Wait)
    assert isinstance(able.pick(facts(1000, klass="bulk"), 10.1), Wait), "not before those of a better class"


def test_those_who_wait_overtake_too_when_who_was_before_them_is_through() -> None:
    made = router(preempts=True)
    made.pick(facts(60_000), 0.0)
    assert isinstance(made.pick(facts(3000), 0.0), Dispatch)
    waiting = made.pick(facts(2900), 0.1)
    assert isinstance(waiting, Wait), "what is left of the one that goes first is not twice as long"
    found = [(tick, effect) for tick in range(2, 40) for effect in made.tick(tick * 0.1)]
    assert [(tick, effect.ticket) for tick, effect in found if isinstance(effect, Dispatch)] == [(29, waiting.ticket)]


def test_a_continued_answer_is_not_overtaken() -> None:
    made = router(preempts=True)
    sent = made.pick(facts(60_000, alike=Likeness("m", "", "", "")), 0.0)
    assert isinstance(sent, Dispatch) and (sent.lease.patience_us, sent.lease.rank) == (0, -1)
    assert isinstance(made.pick(facts(1000), 10.0), Wait)


@pytest.mark.parametrize("preempted", [0, 2])
def test_a_prompt_that_was_put_aside_tells_nothing_of_the_instances_speed(preempted: int) -> None:
    made = router(preempts=True)
    sent = made.pick(facts(10_000), 0.0)
    assert isinstance(sent, Dispatch)
    made.started(sent.lease, 30.0)
    told = Outcome(End.DONE, None, 10_000, 10, ttft_s=30.0, duration_s=31.0, cached_tokens=0, preempted=preempted)
    made.release(sent.lease, told, 31.0)
    slowness = made.fleet.instances["a"].rates.slowness
    assert slowness == 1.0 if preempted else slowness > 1.0
