"""Who is healthy, suspect, lost or gone, by what the registry, the Link, the drain and our own doubts say."""

from __future__ import annotations

from infermesh.errors import Reason
from services.gateway.routing.admission import Bounds
from services.gateway.routing.decision import Close, Dispatch, Eject, Probe, Refuse, Wait
from services.gateway.routing.facts import End, LoadReport, Member, Outcome
from services.gateway.routing.router import Router
from tests.kit.routing import DONE, OLD, endpoint, facts, pick, router


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


def test_a_failed_probe_loses_an_instance_until_a_probe_goes_well() -> None:
    """Its Link may stand all the while: it stalled for longer than a probe waits, and nobody says hello again."""
    r = router(endpoint("a"), endpoint("b"))
    assert r.release(pick(r).lease, Outcome(End.LOST, Reason.INSTANCE_LOST), OLD) == [Probe("a")]
    assert r.probed("a", 1, False, OLD) == [Eject("a", "the probe failed")]
    assert r.fleet.instances["a"].state.value == "ejected"
    assert r.report("a", 1, LoadReport(running=0), OLD + 1) == []
    assert r.fleet.instances["a"].state.value == "ejected", "a sign of life is no sign of health"
    asked = [effect for i in range(20) for effect in r.tick(OLD + 0.05 * i)]
    assert asked == [Probe("a")], "it is asked every half second"
    r.probed("a", 1, True, OLD + 1)
    assert r.fleet.instances["a"].state.value == "ejected", "once is chance"
    r.probed("a", 1, True, OLD + 1)
    assert r.fleet.instances["a"].state.value == "healthy"


def test_the_only_instance_serves_on_though_a_probe_failed() -> None:
    """Where nobody else is, a doubt is no reason to refuse everybody."""
    r = router(endpoint("a"))
    assert r.release(pick(r).lease, Outcome(End.LOST, Reason.INSTANCE_LOST), OLD) == [Probe("a")]
    assert r.probed("a", 1, False, OLD) == []
    assert r.fleet.instances["a"].state.value == "suspect" and pick(r).lease.instance_id == "a"
    r.probed("a", 1, True, OLD + 1)
    assert r.fleet.instances["a"].state.value == "healthy"


def test_a_failed_probe_and_the_registrys_word_together_are_the_end() -> None:
    r = router(endpoint("a"))
    r.probed("a", 1, False, OLD)
    r.update([Member(endpoint("a"), passing=False)], OLD)
    assert r.fleet.instances == {}


def test_waits_end_a_few_dozen_a_tick_and_in_no_order_that_matters() -> None:
    r = router(endpoint("a", running=1), bounds=Bounds(max_requests=2000, max_tokens=1 << 40, max_wait_s=1.0))
    pick(r)
    tickets = [r.pick(facts(priority=i % 7), OLD).ticket for i in range(1000)]  # type: ignore[union-attr]
    assert r.tick(OLD + 0.9) == []
    ended: list[int] = []
    while effects := r.tick(OLD + 1.0):
        assert len(effects) <= 32
        ended += [effect.ticket for effect in effects]  # type: ignore[union-attr]
    assert sorted(ended) == tickets and r.waiting == 0 and not r._desk.queue.requests and not r._desk.queue.tokens


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


def test_a_model_that_nobody_could_tell_of_is_not_one_that_does_not_exist() -> None:
    """The registry was out of reach from the start: 503 and come again, not 404 and give up."""
    r = Router(0.0)
    for stale, reason in ((None, Reason.NO_INSTANCE), (True, Reason.NO_INSTANCE), (False, Reason.MODEL_NOT_FOUND)):
        if stale is not None:
            r.update([], OLD, stale=stale)
        refused = r.pick(facts(), OLD)
        assert isinstance(refused, Refuse) and refused.reason is reason
        assert ("out of reach" in refused.message) is (reason is Reason.NO_INSTANCE)


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


def test_a_life_that_comes_back_still_has_the_work_it_left_with() -> None:
    """It said goodbye to the registry, or was taken for dead, while a request of ours ran on."""
    r = router(endpoint("a", running=1))
    lease = pick(r).lease
    r.goodbye("a", 1, OLD)
    assert r.fleet.instances == {}
    r.update([Member(endpoint("a", running=1))], OLD + 1)
    r.linked("a", 1, OLD + 1)
    waiting = r.pick(facts(since=OLD + 1), OLD + 1)
    assert isinstance(waiting, Wait), "its one place is taken"
    effects = r.release(lease, DONE, OLD + 2)
    assert [e.ticket for e in effects] == [waiting.ticket]  # type: ignore[union-attr]
