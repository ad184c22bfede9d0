from __future__ import annotations

import gc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.gateway.routing.affinity import HINT_SHARE, PrefixIndex, cached_blocks, hint_keys
from services.gateway.routing.rendezvous import cold_key, score

# Prompts as a tree: a path of choices is a prompt, and each of its beginnings a block.
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=7)
NAMES = st.sampled_from(("a", "b", "c", "d"))


def chain(path: list[int]) -> tuple[int, ...]:
    found, key = [], 1
    for step in path:
        key = (key * 1_000_003 + step + 1) % (1 << 60)
        found.append(key)
    return tuple(found)


def naive(held: dict[str, set[int]], keys: tuple[int, ...]) -> dict[str, int]:
    found = {}
    for name, blocks in held.items():
        depth = next((at for at, key in enumerate(keys) if key not in blocks), len(keys))
        if depth:
            found[name] = depth
    return found


class Roomy(RuleBasedStateMachine):
    """Without eviction the index is exactly a set of blocks for each instance, holes included."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[str, set[int]] = {}
        self.epochs: dict[str, int] = {}

    @rule(name=NAMES)
    def track(self, name: str) -> None:
        self.index.track(name)
        self.held.setdefault(name, set())
        self.epochs.setdefault(name, 0)

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        self.index.forget(name)
        self.held.pop(name, None)
        self.epochs.pop(name, None)

    @rule(name=NAMES, path=PATHS)
    def insert(self, name: str, path: list[int]) -> None:
        self.index.insert(name, chain(path))
        if name in self.held:
            self.held[name] |= set(chain(path))

    @rule(name=NAMES, added=PATHS, removed=PATHS, snapshot=st.booleans(), epoch=st.integers(0, 2))
    def frame(self, name: str, added: list[int], removed: list[int], snapshot: bool, epoch: int) -> None:
        gone = chain(removed)[::2]  # leaves holes
        self.index.cache_frame(name, chain(added), gone, snapshot, epoch)
        if name not in self.held:
            return
        if snapshot:
            self.held[name], self.epochs[name] = set(), epoch
        if self.epochs[name] == epoch:
            self.held[name] = self.held[name] - set(gone) | set(chain(added))

    @rule(name=NAMES, path=PATHS, expected=st.integers(0, 7))
    def never_computed(self, name: str, path: list[int], expected: int) -> None:
        self.index.learn(name, chain(path), expected, 0, False)
        if name in self.held:
            self.held[name] -= set(chain(path)[expected:])

    @rule(path=PATHS)
    def ask(self, path: list[int]) -> None:
        found = self.index.match(chain(path))
        assert dict(found) == naive(self.held, chain(path))
        assert [depth for _, depth in found] == sorted((depth for _, depth in found), reverse=True)
        assert set(self.index.holders(chain(path)[-1])) == {
            n for n, held in self.held.items() if chain(path)[-1] in held
        }

    @invariant()
    def counts(self) -> None:
        assert {name: self.index.blocks(name) for name in self.held} == {n: len(h) for n, h in self.held.items()}


class Tight(RuleBasedStateMachine):
    """With little room: bounds hold, nothing is invented, no prefix loses its start before its end."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(max_entries=25, block_tokens=1)
        self.ever: dict[str, set[int]] = {}

    @rule(name=NAMES, capacity=st.integers(1, 12))
    def track(self, name: str, capacity: int) -> None:
        self.index.track(name, capacity)
        self.ever.setdefault(name, set())

    @precondition(lambda self: self.ever)
    @rule(data=st.data(), path=PATHS)
    def insert(self, data: st.DataObject, path: list[int]) -> None:
        name = data.draw(st.sampled_from(sorted(self.ever)))
        self.index.insert(name, chain(path))
        self.ever[name] |= set(chain(path))
        room = self.index._slots[name].capacity
        if len(self.ever) == 1:  # else the common bound may take it at once
            assert dict(self.index.match(chain(path)))[name] == min(room, len(path))

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        self.index.forget(name)
        self.ever.pop(name, None)

    @rule(name=NAMES, path=PATHS, expected=st.integers(0, 7), cached=st.integers(0, 7))
    def told(self, name: str, path: list[int], expected: int, cached: int) -> None:
        self.index.learn(name, chain(path), expected, cached, True)

    @invariant()
    def bounded(self) -> None:
        index = self.index
        assert len(index) <= 25
        for slot in index._slots.values():
            assert slot.size <= slot.capacity <= slot.nominal

    @invariant()
    def no_holes(self) -> None:
        for name in self.ever:
            held = {key for age in self.index._slots[name].ages for key in age}
            assert held <= self.ever[name]
            for path in _all_paths(held):
                assert dict(self.index.match(path)).get(name) == len(path)

    @invariant()
    def masks_say_what_the_ages_say(self) -> None:
        index = self.index
        expected: dict[int, int] = Counter()
        for slot in [*index._slots.values(), *index._dying]:
            for age in slot.ages:
                for key in age:
                    expected[key] += slot.bit
        assert {key: mask for shard in index._masks for key, mask in shard.items()} == expected
        assert len(index) == sum(mask.bit_count() for mask in expected.values())


def _all_paths(held: set[int]) -> list[tuple[int, ...]]:
    """The whole chain of every held block."""
    found: list[tuple[int, ...]] = []
    todo: list[list[int]] = [[]]
    while todo:
        path = todo.pop()
        for step in range(3):
            longer = [*path, step]
            if chain(longer)[-1] in held:
                found.append(chain(longer))
            if len(longer) < 7:
                todo.append(longer)
    return found


TestRoomy = Roomy.TestCase
TestTight = Tight.TestCase
TestTight.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


def test_old_ages_merge_and_keep_their_order() -> None:
    index = PrefixIndex(block_tokens=1)
    index.track("a", 40)
    hot = tuple(range(1, 9))
    for round in range(200):
        index.insert("a", hot)
        index.insert("a", (1000 + 2 * round, 1001 + 2 * round))
    assert dict(index.match(hot)) == {"a": 8}
    assert len(index._slots["a"].ages) <= 6
    assert index.blocks("a") == 40


def test_a_new_life_has_nothing_though_the_old_one_is_still_being_cleaned_up() -> None:
    index = PrefixIndex()
    index.track("a")
    keys = tuple(range(1, 3001))
    index.insert("a", keys)
    index.forget("a")
    index.track("a")
    assert index.match(keys) == []
    assert len(index) > 0
    for key in range(5000, 5020):
        index.insert("a", (key,))
    assert len(index) == 20
    assert index.match((5000,)) == [("a", 1)]


def test_numbers_of_the_forgotten_are_used_again() -> None:
    index = PrefixIndex()
    for life in range(100):
        index.track("a")
        index.insert("a", (life, life + 1))
        index.forget("a")
    assert len(index._numbers) == 1


def test_the_garbage_collector_has_nothing_to_walk() -> None:
    index = PrefixIndex()
    index.track("a", 1 << 22)
    gc.collect()
    before = len(gc.get_objects())
    for start in range(0, 30_000, 100):
        index.insert("a", range(start, start + 100))
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_reports_of_fewer_cached_tokens_shrink_the_assumed_capacity_and_more_let_it_grow() -> None:
    index = PrefixIndex(block_tokens=1)
    index.track("a", 1000)
    for start in range(0, 1000, 10):
        index.insert("a", range(start, start + 10))
    index.learn("a", range(10), 10, 0, True)
    assert index.blocks("a") == 1000  # it has never named cached tokens, so none named means nothing
    index.learn("a", range(10), 2, 10, True)
    for _ in range(5):
        index.learn("a", range(10), 10, 2, True)
    assert index.blocks("a") == pytest.approx(1000 * 0.9**5, abs=5)
    assert dict(index.match(range(990, 1000))) == {"a": 10}  # what was used longest ago has gone
    assert index.match(range(10)) == []
    for _ in range(20):
        index.learn("a", range(10), 10, 10, True)
    index.insert("a", range(5000, 5999))
    assert index.blocks("a") == 1000


def test_frames_end_the_guessing() -> None:
    index = PrefixIndex(block_tokens=1)
    index.track("a", 100)
    index.cache_frame("a", range(100), (), snapshot=True, epoch=3)
    index.learn("a", range(10), 10, 1, True)
    assert index.blocks("a") == 100
    index.cache_frame("a", (), range(50, 100), epoch=2)  # of a cache that is no more
    assert index.blocks("a") == 100
    index.cache_frame("a", (), range(50, 100), epoch=3)
    assert index.blocks("a") == 50
    index.cache_frame("nobody", (1,), ())
    assert index.holders(1) == ["a"]


def test_hints_count_where_the_chain_finds_nobody() -> None:
    index = PrefixIndex()
    index.track("a")
    index.track("b")
    hints = hint_keys("t", "doc", "session")
    assert index.shares((1, 2), 0.25, hints) == {}
    index.insert("b", hints[1:])
    assert index.shares((1, 2), 0.25, hints) == {"b": HINT_SHARE}
    index.insert("a", (1, 2, 3, 4, 5))
    assert index.shares((1, 2), 0.25, hints) == {"a": 0.5}
    assert index.shares((1, 2, 3, 4, 5), 0.25, hints) == {"a": 1.0}
    assert hint_keys("t", "", "") == ()
    assert len({*hint_keys("t", "x", "x"), *hint_keys("u", "x", "x")}) == 4


def test_cached_blocks() -> None:
    assert cached_blocks(512, 1024, 0.125) == 4
    assert cached_blocks(512, 0, 0.125) == cached_blocks(512, 1024, 0.0) == 0


def first(key: int, weights: dict[str, float]) -> str:
    return max(weights, key=lambda name: score(key, name, weights[name]))


def test_rendezvous_follows_the_weights_and_moves_little() -> None:
    weights = {"fast": 3.0, "slow": 1.0, "mid": 2.0}
    firsts = Counter(first(key, weights) for key in range(6000))
    assert firsts["fast"] == pytest.approx(3000, rel=0.06)
    assert firsts["slow"] == pytest.approx(1000, rel=0.1)
    more = {**weights, "new": 2.0}
    moved = [key for key in range(2000) if first(key, more) != first(key, weights)]
    assert {first(key, more) for key in moved} == {"new"}
    assert len(moved) == pytest.approx(500, rel=0.15)


@given(st.integers(0, (1 << 64) - 1), st.permutations(["a", "b", "c", "d", "e"]))
def test_the_first_depends_on_nothing_but_members_and_weights(key: int, order: list[str]) -> None:
    weights = {name: 1.0 + ord(name) % 3 for name in order}
    assert first(key, weights) == first(key, dict(sorted(weights.items())))


def test_nobody_goes_where_the_weight_is_zero() -> None:
    assert score(1, "a", 0.0) == 0.0
    assert all(first(key, {"a": 0.0, "b": 1e-6}) == "b" for key in range(100))


def test_cold_key_lies_beyond_what_is_known() -> None:
    keys = tuple(range(10, 20))
    assert cold_key(keys, 0) == 13
    assert cold_key(keys, 4) == 17
    assert cold_key(keys, 9) == cold_key(keys, 10) == 19
    assert cold_key((), 0) == 0
