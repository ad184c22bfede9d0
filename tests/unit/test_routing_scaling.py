"""How many replicas a group should have: the law by itself, in virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.routing.scaling import Between, Group, Law, Seen

LAW = Law(busy=0.6, idle=0.45, drain_s=100, smooth_s=10, up_s=10, cool_s=100, part=0.25)
STEP = 1.0
TARGET_S = 2.0


def using(part: float, backlog_s: float = 0.0, *, late: bool = False) -> Seen:
    return Seen((part, 0.0, 0.0, 0.0), backlog_s, late)


class Clock:
    """A group that gets what it asks for at once, unless it is told otherwise."""

    def __init__(self, least: int, most: int, count: int) -> None:
        self.group = Group(Between(least, most), LAW)
        self.count, self.now = count, 1000.0
        self.said: list[tuple[float, int]] = []

    def run(self, seconds: float, member: Callable[[int], Seen], *, follows: bool = True, stuck: int = 0) -> int:
        """`member`: one of so many. Returns what is wanted at the end."""
        until = self.now + seconds
        while self.now < until:
            self.now += STEP
            verdict = self.group.look([member(self.count)] * self.count, stuck, TARGET_S, self.now)
            if verdict is not None:
                self.said.append((self.now, verdict.desired))
                self.count = verdict.desired if follows else self.count
        return self.said[-1][1]

    def changes(self) -> list[tuple[float, int]]:
        pairs = zip(self.said, self.said[1:], strict=False)
        return [(at, wanted - before) for (_, before), (at, wanted) in pairs if wanted != before]


def shared(load: float) -> Callable[[int], Seen]:
    """`load` instances' worth of work, spread over them."""
    return lambda count: using(min(1.0, load / max(1, count)))


@pytest.mark.parametrize(
    ("load", "count", "wanted", "why"),
    [
        (1.0, 2, 2, "half used: neither more than 0.6 nor, on one, less than 0.45"),
        (1.3, 2, 3, "1.3 / 0.6 is above 2"),
        (5.9, 6, 10, "5.9 / 0.6"),
        (0.4, 2, 1, "on one it would be below 0.45"),
        (0.0, 4, 1, "idle, one after the other"),
        (40.0, 10, 12, "no more than the bound"),
    ],
)
def test_a_steady_load_finds_its_number(load: float, count: int, wanted: int, why: str) -> None:
    assert Clock(1, 12, count).run(700, shared(load)) == wanted, why


def test_it_grows_when_the_need_has_lasted_and_not_for_a_moment() -> None:
    clock = Clock(1, 8, 2)
    clock.run(60, shared(0.8))
    clock.run(5, shared(2.0))
    assert clock.run(60, shared(0.8)) == 2
    clock.run(60, shared(2.0))
    assert clock.count > 2
    first = clock.changes()[0]
    assert first[1] > 0 and first[0] >= 1000 + 125 + LAW.up_s


def test_it_shrinks_after_the_cool_down_and_by_a_quarter_at_most() -> None:
    clock = Clock(1, 16, 16)
    clock.run(50, shared(9.0))
    assert clock.run(1200, shared(0.5)) == 2
    steps = clock.changes()
    sizes = [16]
    for _, change in steps:
        assert 0 > change >= -max(1, sizes[-1] // 4)
        sizes.append(sizes[-1] + change)
    assert len(steps) > 5
    times = [1000.0] + [at for at, _ in steps]
    assert all(later - earlier >= LAW.cool_s for earlier, later in itertools.pairwise(times))


def test_a_backlog_beyond_the_objective_asks_for_more_and_lets_nobody_go() -> None:
    waiting = Clock(1, 12, 4)
    assert (
        waiting.run(60, lambda _: using(0.2, backlog_s=30), follows=False) == 5
    )  # 1.2 s of 4 to be worked off in 100 s
    assert Clock(1, 12, 4).run(600, lambda _: using(0.2, backlog_s=600), follows=False) == 12
    late = Clock(1, 12, 4)
    late.run(300, lambda _: using(0.1, late=True), follows=False)
    assert min(wanted for _, wanted in late.said) == 4 and late.said[-1][1] == 5


@pytest.mark.parametrize("odd", [None, nan, inf, -inf])
def test_a_number_that_nobody_told_moves_nothing(odd: float | None) -> None:
    clock = Clock(1, 9, 5)
    assert clock.run(900, lambda _: Seen((odd, None, None, None))) == 5
    assert clock.run(900, lambda _: Seen((odd, 0.0, nan, None), nan)) == 5


def test_members_out_of_reach_say_nothing_of_the_need() -> None:
    clock = Clock(1, 9, 5)
    clock.run(60, shared(2.9))
    assert clock.group.look([], 0, TARGET_S, clock.now + 1) is not None
    clock.count = 0
    assert clock.run(600, shared(1.0), follows=False) == 5
    clock.count = 1  # one is back and full: that alone is no need yet
    assert clock.run(5, lambda _: using(1.0), follows=False) == 5


def test_nobody_seen_is_no_opinion() -> None:
    assert Group(Between(2, 4)).look([], 0, TARGET_S, 5.0) is None


def test_one_that_holds_a_place_and_does_not_work_is_needed_on_top() -> None:
    assert Clock(1, 9, 3).run(60, shared(1.7), follows=False, stuck=1) == 4


def test_a_gateway_that_has_just_come_takes_what_it_finds_for_wanted() -> None:
    clock = Clock(1, 9, 2)
    clock.run(10, shared(0.1), follows=False)
    clock.count = 6
    assert clock.run(10, shared(0.1), follows=False) == 6


@settings(max_examples=60, deadline=None)
@given(
    high=st.floats(0.5, 12),
    low=st.floats(0.0, 3),
    half=st.integers(1, 90),
    count=st.integers(1, 12),
)
def test_a_square_wave_within_the_cool_down_does_not_make_it_flap(
    high: float, low: float, half: int, count: int
) -> None:
    clock = Clock(1, 12, count)
    for _ in range(max(4, 900 // half)):
        clock.run(half, shared(high))
        clock.run(half, shared(low))
    directions = [change > 0 for _, change in clock.changes()]
    assert sum(a != b for a, b in itertools.pairwise(directions)) <= 1


@settings(max_examples=60, deadline=None)
@given(
    bounds=st.tuples(st.integers(1, 6), st.integers(0, 6)),
    looks=st.lists(
        st.tuples(
            st.integers(0, 9),
            st.one_of(st.none(), st.floats(allow_nan=True), st.floats(0, 1)),
            st.one_of(st.just(nan), st.floats(0)),
            st.booleans(),
            st.integers(0, 3),
            st.floats(0.05, 200),
        ),
        max_size=120,
    ),
)
def test_whatever_it_is_told_it_stays_within_its_bounds_and_lets_nobody_go_while_behind(
    bounds: tuple[int, int], looks: Iterable[tuple[int, float | None, float, bool, int, float]]
) -> None:
    group = Group(Between(bounds[0], bounds[0] + bounds[1]), LAW)
    now, before, changed = 0.0, None, 0.0
    for count, part, backlog_s, late, stuck, passed in looks:
        now += passed
        members = [Seen((part, part, None, part), backlog_s, late)] * count
        verdict = group.look(members, stuck, TARGET_S, now)
        if verdict is None:
            assert before is None and not members
            continue
        assert bounds[0] <= verdict.desired <= sum(bounds)
        changed = now if before is None else changed
        if before is not None and verdict.desired < before:
            assert now - changed >= LAW.cool_s
            assert not late and not TARGET_S < backlog_s < inf
        changed = now if verdict.desired != before else changed
        before = verdict.desired
