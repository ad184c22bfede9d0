"""The operator's split: when a class of cards is barred, and when that ends."""

from __future__ import annotations

import pytest

from registry.endpoint import Endpoint, Hardware, Speed
from services.gateway.routing.facts import Facts
from services.gateway.routing.fleet import Instance
from services.gateway.routing.health import State
from services.gateway.routing.ledger import Entry
from services.gateway.routing.line import Waiting
from services.gateway.routing.rates import rates
from services.gateway.routing.split import Split


def instance(device: str, state: State = State.HEALTHY) -> Instance:
    speed = Speed(prefill_tps=1000, step_ms=20)
    at = Endpoint(device, "llm", "h", 9, model="m", incarnation=1, hardware=Hardware(device), speed=speed)
    made = Instance(at, rates(at))
    made.state = state
    return made


def wait_for(there: Instance, *, late: bool, work: float = 3.0) -> None:
    there.line.add(Waiting(1, Facts("llm", "m"), 10, 1e9, 0.0, {}, late=late), there.id, work, 0.0)


@pytest.mark.parametrize(
    ("got", "late_for", "barred"),
    [
        ((60, 40), "ab", ()),  # as it should be
        ((80, 20), "b", ("a",)),
        ((40, 60), "a", ("b",)),
        ((40, 60), "", ()),  # those who wait are in time
        ((40, 60), "b", ()),  # nobody waits for the class that is behind: it would never catch up
    ],
)
def test_the_class_ahead_is_barred_while_somebody_is_late_for_the_other(
    got: tuple[int, int], late_for: str, barred: tuple[str, ...]
) -> None:
    a, b = pool = [instance("a"), instance("b")]
    for one in pool:
        wait_for(one, late=one.id in late_for)
    split = Split({"a": 6, "b": 4})
    split.served(a, got[0], pool, 10.0)
    split.served(b, got[1], pool, 10.0)
    assert tuple(one.id for one in pool if one.barred) == barred


def test_a_class_alone_in_health_is_never_barred() -> None:
    a, b = pool = [instance("a", State.LOST), instance("b")]
    wait_for(a, late=True)
    split = Split({"a": 6, "b": 4})
    split.served(b, 100, pool, 10.0)
    assert not b.barred


def test_idle_time_that_would_have_served_all_who_wait_is_given_back() -> None:
    a, b = pool = [instance("a"), instance("b")]
    wait_for(a, late=True, work=3.0)
    split = Split({"a": 6, "b": 4})
    split.served(b, 100, pool, 10.0)
    barred = []
    for tenth in range(1, 81):
        split.settle(pool, 10.0 + tenth / 10)
        barred.append(b.barred)
    assert barred[:29] == [True] * 29, "3 s wait, and it has not been idle for so long"
    assert not any(barred[31:59]), "undivided for as long as it was idle"
    assert all(barred[62:]), "who waits is still there: the fleet is too small after all"


def test_a_barred_instance_that_still_computes_is_not_idle() -> None:
    a, b = pool = [instance("a"), instance("b")]
    wait_for(a, late=True, work=3.0)
    b.ledger.reserve(1, Entry(prompt=9000, work=9_000_000, output=1, slots=1), 10.0)
    split = Split({"a": 6, "b": 4})
    split.served(b, 100, pool, 10.0)
    for tenth in range(80):
        split.settle(pool, 10.0 + tenth / 10)
        assert b.barred
