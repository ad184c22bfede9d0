"""Silence, standstill and stalls, in virtual time: who is taken out when, and who is not."""

from __future__ import annotations

import pytest

from infermesh.errors import Reason
from services.gateway.routing.decision import Abandon, Lease, Probe
from services.gateway.routing.facts import End, LoadReport
from services.gateway.routing.watch import patience
from tests.kit.routing import endpoint
from tests.kit.virtual import Virtual, virtual


def streams(mesh: Virtual, count: int, **given: object) -> list[Lease]:
    leases: list[Lease] = []
    for _ in range(count):
        lease = mesh.pick(**given)
        assert lease is not None
        mesh.begin(lease)
        leases.append(lease)
    return leases


def of(leases: list[Lease], id: str) -> list[Lease]:
    return [lease for lease in leases if lease.instance_id == id]


def test_an_engine_that_stands_still_is_suspect_then_out_and_its_calls_move() -> None:
    """Health, Link and connection are well all the while."""
    mesh = virtual("a", "b")
    leases = streams(mesh, 8)
    began = mesh.now
    mesh.instances["a"].working = False
    mesh.run(1.8)
    assert mesh.states() == {"a": "suspect", "b": "healthy"} and mesh.pick().instance_id == "b"  # type: ignore[union-attr]
    mesh.run(0.7)
    assert mesh.states() == {"a": "ejected", "b": "healthy"}
    assert mesh.ejected("a")[0] - began <= 2.5
    assert {mesh.ends.get(lease.seq) for lease in of(leases, "a")} == {"lost"}
    assert not any(lease.seq in mesh.ends for lease in of(leases, "b"))
    mesh.instances["a"].working = True
    mesh.run(8.0)
    assert mesh.state("a") == "probation"
    trial = mesh.pick()
    assert trial is not None and trial.instance_id == "a", "it is tried as soon as there is anything to try"


def test_a_process_whose_loop_is_blocked_is_out_within_two_and_a_half_seconds_and_back_after_two_probes() -> None:
    mesh = virtual("a", "b")
    streams(mesh, 4)
    began = mesh.now
    mesh.instances["a"].working = mesh.instances["a"].talking = False
    mesh.run(2.7)
    assert mesh.state("a") == "ejected" and mesh.ejected("a")[0] - began <= 2.55
    mesh.run(2.3)
    mesh.instances["a"].working = mesh.instances["a"].talking = True
    mesh.run(3.0)
    assert mesh.state("a") == "healthy" and mesh.router.fleet.instances["a"].share < 0.3


def test_an_idle_instance_whose_link_is_quiet_is_asked_and_goes_on_when_it_answers() -> None:
    mesh = virtual("a", "b")
    mesh.instances["a"].talking = False
    mesh.run(1.7)
    assert mesh.state("a") == "suspect" and mesh.seen(Probe)
    mesh.instances["a"].talking = True
    mesh.run(0.2)
    assert mesh.state("a") == "healthy" and not mesh.ejected("a")


def test_our_own_standstill_is_nobodys_fault() -> None:
    mesh = virtual("a", "b")
    leases = streams(mesh, 8)
    for _ in range(20):
        mesh.run(5.0, asleep=True)
        mesh.run(0.1)
    assert mesh.states() == {"a": "healthy", "b": "healthy"} and not mesh.seen(Probe)
    assert not any(lease.seq in mesh.ends for lease in leases)


@pytest.mark.parametrize("working", [True, False])
def test_a_long_prefill_survives_as_long_as_the_engine_steps(working: bool) -> None:
    """60 s of silence on the only call of an instance; its steps advance, or nothing does."""
    mesh = virtual(endpoint("a", tps=1000), endpoint("b", tps=1000))
    lease = mesh.pick(prompt_tokens=5000)
    assert lease is not None
    mesh.instances[lease.instance_id].working = working
    mesh.run(20.0)
    assert (lease.seq in mesh.ends) is False, "5 s predicted: four times that is its right"
    mesh.run(40.0)
    assert (lease.seq in mesh.ends) is not working


def test_what_is_thought_to_be_computed_takes_no_patience_away_before_the_first_token() -> None:
    mesh = virtual(endpoint("a", tps=1000))
    lease = mesh.pick(prompt_tokens=20_000)
    assert lease is not None
    instance = mesh.router.fleet.instances["a"]
    before = patience(instance)
    mesh.router.report("a", 1, LoadReport(1, 0, 0, seen_seq=lease.seq, own_running=1, own_queued_tokens=0), mesh.now)
    assert not instance.ledger.pending and patience(instance) == before > 20
    mesh.begin(lease)
    assert patience(instance) < before


def test_a_prediction_is_enough_where_nobody_counts_steps() -> None:
    mesh = virtual(endpoint("a", tps=1000), endpoint("b", tps=1000))
    lease = mesh.pick(prompt_tokens=20_000)
    assert lease is not None
    mesh.instances[lease.instance_id].counts_steps = False
    mesh.run(60.0)
    assert lease.seq not in mesh.ends
    mesh.run(60.0)
    assert mesh.ends[lease.seq] == "lost"


def test_one_stream_that_stalls_moves_alone() -> None:
    mesh = virtual("a", "b")
    leases = streams(mesh, 8)
    (victim, *others) = of(leases, "a")
    mesh.instances["a"].stalled.add(victim.seq)
    mesh.run(5.0)
    assert [effect.seq for _, effect in mesh.seen(Abandon)] == [victim.seq]  # type: ignore[attr-defined]
    assert mesh.states() == {"a": "healthy", "b": "healthy"}
    assert not any(lease.seq in mesh.ends for lease in others)


def test_where_nobody_else_is_nothing_is_cut() -> None:
    mesh = virtual("a")
    leases = streams(mesh, 4)
    mesh.instances["a"].working = False
    mesh.run(30.0)
    assert mesh.state("a") == "suspect" and not mesh.seen(Abandon)
    mesh.instances["a"].working = True
    mesh.run(1.0)
    assert mesh.state("a") == "healthy" and not any(lease.seq in mesh.ends for lease in leases)


def test_a_caller_who_reads_slowly_is_no_silence() -> None:
    mesh = virtual("a", "b")
    lease = mesh.pick()
    assert lease is not None
    mesh.router.started(lease, mesh.now)
    mesh.router.progressed(lease, 1)  # and nobody asks for more
    del mesh.leases[lease.seq]
    mesh.run(60.0)
    assert mesh.states() == {"a": "healthy", "b": "healthy"} and not mesh.seen(Abandon)


def test_slow_steps_raise_the_bound() -> None:
    """A token every 0.8 s: ten times that is silence, two seconds are not."""
    mesh = virtual("a", "b")
    (lease,) = streams(mesh, 1)
    mesh.leases.clear()
    mesh.instances[lease.instance_id].counts_steps = False
    for _ in range(150):
        mesh.run(0.8)
        mesh.router.progressed(lease, 1)
        mesh.router.heeding(lease)
    mesh.run(4.0)
    assert mesh.state(lease.instance_id) == "healthy"
    mesh.run(5.0)
    assert mesh.state(lease.instance_id) == "ejected"


def test_three_failures_in_a_row_then_one_trial_at_a_time() -> None:
    mesh = virtual("a", "b")
    mesh.instances["a"].failing = True
    failed = 0
    for _ in range(20):
        lease = mesh.pick()
        failed += lease is None
        if lease is not None:
            mesh.end(lease)
        mesh.run(0.05)
    assert failed == 3 and mesh.state("a") == "ejected"
    mesh.run(7.0)
    assert mesh.state("a") == "probation"
    while mesh.pick(excluded=frozenset({"b"})) is not None:
        mesh.run(0.05)
    assert mesh.state("a") == "ejected", "its trial failed"
    assert len(mesh.ejected("a")) == 2
    mesh.run(7.0)
    assert mesh.state("a") == "ejected", "twice as long"
    mesh.run(7.0)
    mesh.instances["a"].failing = False
    trial = mesh.pick(excluded=frozenset({"b"}))
    assert trial is not None and trial.instance_id == "a"
    assert mesh.pick(excluded=frozenset({"b"})) is None, "one at a time"
    mesh.end(trial)
    a = mesh.router.fleet.instances["a"]
    assert a.state.value == "healthy" and a.share == 0.1
    mesh.run(15.0)
    assert 0.45 < a.share < 0.55
    mesh.run(16.0)
    assert a.share == 1.0


def test_the_callers_own_errors_count_for_nothing() -> None:
    mesh = virtual("a", "b")
    for end, reason in ((End.REFUSED, Reason.INVALID_ARGUMENT), (End.CANCELLED, Reason.DEADLINE_EXCEEDED)) * 20:
        lease = mesh.pick()
        assert lease is not None
        mesh.end(lease, end, reason)
    assert mesh.states() == {"a": "healthy", "b": "healthy"}
