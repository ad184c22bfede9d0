"""The supervisor's decisions, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.launch.supervise import BAD_CONFIG, Child, Effect, Policy, State, begin, delay, exited, ready, stop, tick

POLICY = Policy(first_s=1, factor=2, most_s=10, stable_s=60, early_deaths=3, grace_s=5)
SIGKILL = -9


def running(now: float = 0) -> Child:
    child, _ = begin("a", now)
    child, _ = ready(child, now)
    return child


def test_a_child_starts_and_gets_ready() -> None:
    child, effects = begin("a", 0)
    assert effects == (Effect.START,) and child.state is State.STARTING
    child, effects = ready(child, 3)
    assert effects == () and (child.state, child.since, child.ever_ready) == (State.READY, 3, True)


def test_a_death_is_swept_before_the_restart() -> None:
    child, effects = exited(running(), SIGKILL, 10, POLICY)
    assert effects == (Effect.SWEEP,) and child.state is State.BACKOFF and child.restart_at == 11
    assert tick(child, 10.9, POLICY) == (child, ())
    child, effects = tick(child, 11, POLICY)
    assert effects == (Effect.START,) and child.state is State.STARTING and child.restarts == 1


def test_the_delay_grows_and_is_bounded() -> None:
    assert [delay(deaths, POLICY) for deaths in (1, 2, 3, 4, 5, 100_000)] == [1, 2, 4, 8, 10, 10]


def test_a_stable_life_begins_anew() -> None:
    child, now = running(), 0.0
    for expected in (1, 2, 4):
        child, _ = exited(child, 1, now + 59, POLICY)
        assert child.restart_at - (now + 59) == expected
        now = child.restart_at
        child, _ = tick(child, now, POLICY)
        child, _ = ready(child, now)
    child, _ = exited(child, 1, now + 60, POLICY)
    assert child.restart_at - (now + 60) == 1


def test_one_that_never_got_ready_is_given_up() -> None:
    child, _ = begin("a", 0)
    for _ in range(2):
        child, _ = exited(child, 1, 0, POLICY)
        assert child.state is State.BACKOFF
        child, _ = tick(child, child.restart_at, POLICY)
    child, effects = exited(child, 1, 0, POLICY)
    assert child.state is State.FAILED and effects == (Effect.SWEEP,)


def test_one_that_cannot_run_as_configured_is_given_up_at_once_but_not_later() -> None:
    child, _ = begin("a", 0)
    assert exited(child, BAD_CONFIG, 1, POLICY)[0].state is State.FAILED
    # It did run so configured: the card's memory may not be free yet, say.
    assert exited(running(), BAD_CONFIG, 1, POLICY)[0].state is State.BACKOFF


def test_one_that_was_drained_stays_away() -> None:
    child, effects = exited(running(), 0, 9, POLICY)
    assert child.state is State.STOPPED and effects == (Effect.SWEEP,) and child.settled


def test_stopping_terminates_the_leader_and_sweeps_after_the_grace_period() -> None:
    child, effects = stop(running(), 10)
    assert effects == (Effect.TERMINATE,) and child.state is State.STOPPING
    assert stop(child, 11) == (child, ()), "one SIGTERM is enough: a second one would cut the drain short"
    assert tick(child, 14.9, POLICY)[1] == ()
    child, effects = tick(child, 15, POLICY)
    assert effects == (Effect.SWEEP,)
    assert exited(child, SIGKILL, 15, POLICY)[0].state is State.STOPPED


def test_stopping_hard_sweeps_at_once() -> None:
    child, effects = stop(running(), 10, hard=True)
    assert effects == (Effect.SWEEP,) and child.state is State.STOPPING


@pytest.mark.parametrize("code", [1, 2, -9])
def test_a_child_that_waits_for_its_restart_is_not_started_to_be_stopped(code: int) -> None:
    child, _ = exited(running(), code, 0, POLICY)
    child, effects = stop(child, 1)
    assert effects == () and child.state is State.STOPPED
    assert tick(child, 1e9, POLICY) == (child, ())


@given(
    st.lists(
        st.one_of(
            st.just(("ready", 0)),
            st.tuples(st.just("exited"), st.sampled_from([0, 1, 2, -9])),
            st.just(("tick", 0)),
            st.tuples(st.just("stop"), st.sampled_from([0, 1])),
        ),
        max_size=60,
    ),
    st.lists(st.floats(0, 100), min_size=60, max_size=60),
)
def test_whatever_happens_there_is_one_process_at_a_time(events: list[tuple[str, int]], waits: list[float]) -> None:
    """A process is started only when the last one is gone, never after a stop; deaths are always swept."""
    child, _ = begin("a", 0)
    now, alive, stopped = 0.0, True, False
    for (event, value), wait in zip(events, waits, strict=False):
        now += wait
        if event == "exited" and not alive:
            continue
        if event == "ready":
            child, effects = ready(child, now)
        elif event == "exited":
            child, effects = exited(child, value, now, POLICY)
            assert Effect.SWEEP in effects
            alive = False
        elif event == "tick":
            child, effects = tick(child, now, POLICY)
        else:
            child, effects = stop(child, now, hard=bool(value))
            stopped = True
        if Effect.START in effects:
            assert not alive and not stopped
            alive = True
        assert not (child.settled and alive)
        if stopped:
            assert child.state in (State.STOPPING, State.STOPPED, State.FAILED)
