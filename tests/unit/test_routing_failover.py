"""When a failed attempt goes elsewhere, from the beginning or from where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infermesh.errors import TABLE, Reason
from services.gateway.routing.failover import BREAKS, FREE, MAX_RESUMES, Budget, Next, Progress, next

FRESH = Progress(attempts=1, events=0, time_left_s=10)
UNDER_WAY = Progress(attempts=0, events=7, time_left_s=10, resumable=True)


@pytest.mark.parametrize("reason", list(Reason))
def test_only_what_another_instance_may_answer_goes_elsewhere(reason: Reason) -> None:
    want = Next.OTHER if TABLE[reason].elsewhere else Next.STOP
    assert next(reason, FRESH, Budget(live=1)) is want
    assert next(reason, replace(FRESH, resumable=True), Budget(live=1)) is want, "what is not sent is not resumed"


@pytest.mark.parametrize("reason", list(Reason))
def test_after_the_first_event_a_stream_is_resumed_or_ends(reason: Reason) -> None:
    assert next(reason, replace(UNDER_WAY, resumable=False), Budget(live=1)) is Next.STOP
    assert next(reason, UNDER_WAY, Budget(live=1)) is (Next.RESUME if reason in BREAKS else Next.STOP)


def test_callers_own_endings_never_move() -> None:
    for reason in (Reason.CANCELLED, Reason.DEADLINE_EXCEEDED, Reason.INVALID_ARGUMENT, Reason.INTERNAL):
        assert next(reason, UNDER_WAY, Budget(live=1)) is Next.STOP


def test_attempts_deadline_and_budget_bound_it() -> None:
    failed = Reason.ENGINE_FAILED
    assert next(failed, Progress(2, 0, 10), Budget(live=1)) is Next.OTHER
    assert next(failed, Progress(3, 0, 10), Budget(live=1)) is Next.STOP
    assert next(failed, Progress(1, 0, 0.001), Budget(live=1)) is Next.STOP
    assert next(failed, FRESH, Budget(live=1, retrying=3)) is Next.STOP
    assert next(failed, FRESH, Budget(live=1, credit=0.9)) is Next.STOP
    assert next(failed, FRESH, Budget(live=100, retrying=19)) is Next.OTHER
    assert next(failed, FRESH, Budget(live=100, retrying=20)) is Next.STOP


def test_what_breaks_two_engines_is_not_shown_to_a_third() -> None:
    for start in (FRESH, UNDER_WAY):
        assert next(Reason.ENGINE_FAILED, replace(start, engine_failures=1), Budget(live=1)) is not Next.STOP
        assert next(Reason.ENGINE_FAILED, replace(start, engine_failures=2), Budget(live=1)) is Next.STOP
        assert next(Reason.INSTANCE_LOST, replace(start, engine_failures=2), Budget(live=1)) is Next.STOP


def test_a_death_spends_attempts_but_no_budget() -> None:
    lost = Reason.INSTANCE_LOST
    assert next(lost, FRESH, Budget(live=1, retrying=100)) is Next.OTHER
    assert next(lost, Progress(3, 0, 10), Budget(live=100)) is Next.STOP
    assert next(lost, replace(UNDER_WAY, attempts=2), Budget(live=1, retrying=100)) is Next.RESUME
    assert next(lost, replace(UNDER_WAY, attempts=3), Budget(live=1)) is Next.STOP


def test_a_stream_moves_so_often_and_not_for_ever() -> None:
    assert next(Reason.INSTANCE_LOST, replace(UNDER_WAY, resumes=MAX_RESUMES - 1), Budget(live=1)) is Next.RESUME
    for start in (UNDER_WAY, replace(FRESH, resumable=True)):
        assert next(Reason.INSTANCE_LOST, replace(start, resumes=MAX_RESUMES), Budget(live=1)) is Next.STOP


def test_a_refusal_before_dispatch_costs_no_budget() -> None:
    for reason in FREE:
        assert next(reason, Progress(3, 0, 10), Budget(live=1, retrying=9)) is Next.OTHER
        assert next(reason, replace(UNDER_WAY, attempts=3), Budget(live=1, retrying=9)) is Next.RESUME


def test_where_everything_fails_at_once_retries_stay_below_a_fifth_of_the_requests() -> None:
    """One after the other, so that never many run at a time."""
    budget, retries = Budget(), 0
    for _ in range(1000):
        budget.enter()
        if next(Reason.ENGINE_FAILED, FRESH, budget) is Next.OTHER:
            budget.spend()
            retries += 1
        budget.live -= 1
    assert 150 <= retries <= 200
