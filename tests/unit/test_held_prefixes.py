from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.chassis import held_prefixes
from services.chassis.held_prefixes import FRAME, HeldPrefixes


def live() -> HeldPrefixes:
    held = HeldPrefixes()
    held.live = True
    return held


class Gateway:
    """What one gateway makes of the frames."""

    def __init__(self) -> None:
        self.seen: int | None = None
        self.known: set[int] = set()
        self.epoch = 0
        self.snapshots = 0

    def hear(self, held: HeldPrefixes) -> None:
        frames, self.seen = held.frames(self.seen)
        for frame in frames:
            assert len(frame.added) + len(frame.removed) <= FRAME
            if frame.snapshot:
                self.known, self.epoch = set(), frame.epoch
                self.snapshots += 1
            assert frame.epoch == self.epoch
            self.known -= set(frame.removed)
            self.known |= set(frame.added)


def test_a_block_of_the_chain_is_held_while_the_engine_holds_the_block_it_ends_in() -> None:
    held, gateway = live(), Gateway()
    gateway.hear(held)
    held.tie([11, 12, 13, 14], 0.25, 64, [1, 2, 3, 4], 16)
    gateway.hear(held)
    assert (gateway.known, gateway.snapshots) == (set(), 1)
    for key in (1, 2, 3):
        held.stored(key)
    gateway.hear(held)
    assert gateway.known == {11, 12, 13} == set(held.held)
    held.removed(3)
    held.stored(4)
    gateway.hear(held)
    assert gateway.known == {11, 12, 14}
    assert gateway.snapshots == 1


def test_blocks_of_other_sizes() -> None:
    held = live()
    held.tie([21, 22], 0.4, 100, list(range(1, 7)), 16)  # 40 and 80 tokens: in the third and the fifth block
    held.stored(3)
    assert held.held == [21]
    held.stored(5)
    assert held.held == [21, 22]
    held.tie([31, 32, 33, 34], 0.25, 40, [50], 32)  # one block of the engine stands for all; the rest is in no full one
    held.stored(50)
    assert set(held.held) == {21, 22, 31, 32, 33, 34}
    held.removed(50)
    assert set(held.held) == {21, 22}
    held.tie([41], 1.0, 5, [], 16)
    assert 41 not in held.held


def test_nothing_is_told_before_the_engine_reports() -> None:
    held = HeldPrefixes()
    assert held.frames(None) == ([], None)
    held.live = True
    (frame,), seen = held.frames(None)
    assert frame.snapshot and not frame.added and seen is not None


def test_who_comes_late_or_falls_behind_gets_a_snapshot(monkeypatch) -> None:
    monkeypatch.setattr(held_prefixes, "JOURNAL", 50)
    held, slow = live(), Gateway()
    slow.hear(held)
    held.tie(range(100, 200), 0.01, 1600, list(range(100)), 16)
    for key in range(100):
        held.stored(key)
    for key in range(0, 40):
        held.removed(key)
    late = Gateway()
    late.hear(held)
    slow.hear(held)
    assert late.known == slow.known == set(range(140, 200))
    assert (late.snapshots, slow.snapshots) == (1, 2)


def test_a_cleared_cache_is_another_epoch() -> None:
    held, gateway = live(), Gateway()
    held.tie([1], 1.0, 16, [7], 16)
    held.stored(7)
    gateway.hear(held)
    before = gateway.epoch
    held.cleared()
    gateway.hear(held)
    assert gateway.known == set() and gateway.epoch == before + 1
    held.stored(7)
    assert held.held == []  # nobody has said since what the block is


def test_large_snapshots_come_in_several_frames() -> None:
    held, gateway = live(), Gateway()
    count = 2 * FRAME + 5
    held.tie(range(1, count + 1), 1 / count, 16 * count, list(range(count)), 16)
    for key in range(count):
        held.stored(key)
    gateway.hear(held)
    assert len(gateway.known) == count and gateway.snapshots == 1


def test_ties_are_bounded_and_those_never_computed_go_first(monkeypatch) -> None:
    monkeypatch.setattr(held_prefixes, "MOST", 64)
    held = live()
    held.tie([1, 2], 0.5, 32, [1, 2], 16)
    held.stored(1)
    held.stored(2)
    for start in range(100, 1000, 10):
        held.tie(range(start, start + 10), 0.1, 160, list(range(start, start + 10)), 16)
    assert held.held == [1, 2]
    assert len(held._keys) <= 64
    for key in range(100, 1000):
        held.stored(key)
    for start in range(2000, 3000, 10):
        held.tie(range(start, start + 10), 0.1, 160, list(range(start, start + 10)), 16)
        for key in range(start, start + 10):
            held.stored(key)
    assert len(held._keys) <= 64
    assert sorted(held.held)[-10:] == list(range(2990, 3000))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["tie", "store", "remove", "clear", "hear", "join"]), st.integers(0, 9), st.integers(1, 4)
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(OPERATIONS)
def test_every_gateway_ends_with_what_is_held(operations: list[tuple[str, int, int]]) -> None:
    held, gateways = live(), [Gateway()]
    for what, number, length in operations:
        if what == "tie":
            keys = list(range(number, number + length))
            held.tie([100 * number + at for at in range(length)], 1 / length, 16 * length, keys, 16)
        elif what == "store":
            held.stored(number)
        elif what == "remove":
            held.removed(number)
        elif what == "clear":
            held.cleared()
        elif what == "hear":
            gateways[number % len(gateways)].hear(held)
        else:
            gateways.append(Gateway())
    for gateway in gateways:
        gateway.hear(held)
        assert gateway.known == set(held.held)
