"""When a failed attempt goes elsewhere."""

from __future__ import annotations

import pytest

from infermesh.errors import TABLE, Reason
from services.gateway.routing.failover import FREE, Budget, Next, Progress, next

FRESH = Progress(attempts=1, events=0, time_left_s=10)


@pytest.mark.parametrize("reason", list(Reason))
def test_only_what_another_instance_may_answer_goes_elsewhere(reason: Reason) -> None:
    want = Next.OTHER if TABLE[reason].elsewhere else Next.STOP
    assert next(reason, FRESH, Budget(live=1)) is want


@pytest.mark.parametrize("reason", list(Reason))
def test_never_after_the_first_event(reason: Reason) -> None:
    assert next(reason, Progress(1, 1, 10), Budget(live=1)) is Next.STOP


def test_attempts_deadline_and_budget_bound_it() -> None:
    failed = Reason.ENGINE_FAILED
    assert next(failed, Progress(2, 0, 10), Budget(live=1)) is Next.OTHER
    assert next(failed, Progress(3, 0, 10), Budget(live=1)) is Next.STOP
    assert next(failed, Progress(1, 0, 0.001), Budget(live=1)) is Next.STOP
    assert next(failed, FRESH, Budget(live=1, retrying=3)) is Next.STOP
    assert next(failed, FRESH, Budget(live=100, retrying=19)) is Next.OTHER
    assert next(failed, FRESH, Budget(live=100, retrying=20)) is Next.STOP


def test_a_death_spends_attempts_but_no_budget() -> None:
    lost = Reason.INSTANCE_LOST
    assert next(lost, FRESH, Budget(live=1, retrying=100)) is Next.OTHER
    assert next(lost, Progress(3, 0, 10), Budget(live=100)) is Next.STOP


def test_a_refusal_before_dispatch_costs_no_budget() -> None:
    for reason in FREE:
        assert next(reason, Progress(3, 0, 10), Budget(live=1, retrying=9)) is Next.OTHER
