"""When a process is to stop, and when it is not after all."""

from __future__ import annotations

import pytest

from services.chassis.signals import Stop


def test_a_drain_that_is_taken_back_leaves_nothing_behind() -> None:
    stop = Stop()
    assert not stop.undo() and not stop.resume()
    stop.ask(7.0)
    stop.ask(9.0)
    assert stop.grace_s == 7.0 and not stop.resume() and stop.undo() and stop.resume()
    assert not stop.asked.is_set() and not stop.undone.is_set() and stop.grace_s is None and not stop.resume()


@pytest.mark.parametrize("signalled", [False, True])
def test_who_asks_again_before_the_process_has_seen_that_it_was_taken_back_is_heard(signalled: bool) -> None:
    """It leaves once more: what it no longer waited for, when that was taken back, is waited for again."""
    stop = Stop()
    stop.ask(7.0)
    assert stop.undo()
    if signalled:
        stop._signalled()
    else:
        stop.ask(3.0)
    assert stop.resume()
    assert stop.asked.is_set() and not stop.undone.is_set() and stop.grace_s == (None if signalled else 3.0)
    assert stop.undo() is not signalled, "nobody takes a signal back"


def test_the_last_word_counts() -> None:
    stop = Stop()
    stop.ask()
    assert stop.undo()
    stop.ask()
    assert stop.undo() and stop.resume()
    assert not stop.asked.is_set()
