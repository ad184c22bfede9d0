"""The micro-batcher: nothing lost, nothing twice, the budget held, the order fair; all in virtual time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infermesh.errors import MeshError, Reason
from services.chassis.encoding.microbatch import WASTE_FLOOR, WASTE_SHARE, Limits, MicroBatcher

REQUEST = st.tuples(
    st.lists(st.integers(1, 600), min_size=1, max_size=40),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(0, 1),
)


def drain(batcher, now=0.0, free=1, busy=0):
    batches = []
    while (batch := batcher.take(now, free, busy)) is not None:
        batches.append(batch)
    return batches


def owners(batch):
    return {item.owner for item in batch.items}


@given(st.lists(REQUEST, max_size=12), st.integers(1, 4), st.sets(st.integers(0, 11)))
def test_nothing_is_lost_doubled_or_mixed_and_the_budget_holds(requests, free, leavers):
    limits = Limits(batch_tokens=512, batch_rows=16, queue_tokens=1 << 20)
    batcher = MicroBatcher(limits)
    wanted = set()
    for owner, (lengths, bulk, priority, group) in enumerate(requests):
        batcher.offer(owner, lengths, now=owner * 0.001, bulk=bulk, priority=priority, groups=[group] * len(lengths))
        if owner not in leavers:
            wanted |= {(owner, place) for place in range(len(lengths))}
    assert len(batcher) == sum(len(lengths) for lengths, *_ in requests)
    for owner in leavers:
        batcher.drop(owner)
    given_out = []
    for batch in drain(batcher, now=10.0, free=free):
        assert batch.tokens <= limits.batch_tokens or len(batch.items) == 1
        assert len(batch.items) <= limits.batch_rows
        assert len({item.group for item in batch.items}) == 1
        real = sum(item.length for item in batch.items)
        assert batch.tokens - real <= max(WASTE_FLOOR, WASTE_SHARE * real)
        given_out += [(item.owner, item.place) for item in batch.items]
    assert len(given_out) == len(set(given_out))
    assert set(given_out) == wanted
    assert (len(batcher), batcher.tokens) == (0, 0)


@given(st.lists(REQUEST, min_size=1, max_size=8))
def test_the_one_that_waited_longest_is_always_in_the_next_batch(requests):
    batcher = MicroBatcher(Limits(batch_tokens=256, queue_tokens=1 << 20))
    for owner, (lengths, bulk, priority, group) in enumerate(requests):
        batcher.offer(owner, lengths, now=0.0, bulk=bulk, priority=priority, groups=[group] * len(lengths))
    while len(batcher):
        head = batcher._queue[0]
        batch = batcher.take(0.0, 1, 0)
        assert head in batch.items
        assert head.bulk or not any(item.bulk for item in batch.items)


def test_an_idle_machine_waits_for_nothing_and_a_busy_one_for_a_moment():
    batcher = MicroBatcher(Limits(wait_s=0.002))
    batcher.offer(1, [5], now=1.0)
    assert batcher.take(1.0, free=0, busy=2) is None
    assert batcher.due(1.0, free=0, busy=2) is None
    assert batcher.take(1.0, free=1, busy=1) is None
    assert batcher.due(1.0, free=1, busy=1) == pytest.approx(1.002)
    batcher.offer(2, [5], now=1.001)
    assert owners(batcher.take(1.0021, free=1, busy=1)) == {1, 2}
    batcher.offer(3, [5], now=2.0)
    assert owners(batcher.take(2.0, free=2, busy=0)) == {3}


def test_a_full_batch_is_not_held_back():
    batcher = MicroBatcher(Limits(batch_tokens=100, wait_s=1.0))
    batcher.offer(1, [10] * 10, now=0.0)
    assert len(batcher.take(0.0, free=1, busy=1).items) == 10


def test_like_lengths_go_together():
    batcher = MicroBatcher(Limits(batch_tokens=2048))
    for owner in range(20):
        batcher.offer(owner, [200 if owner % 2 else 10], now=owner * 1e-6)
    first, second = batcher.take(1.0, 1, 0), batcher.take(1.0, 1, 0)
    assert {item.length for item in first.items} == {10}
    assert {item.length for item in second.items} == {200}


def test_online_goes_before_bulk_but_not_for_ever():
    batcher = MicroBatcher(Limits(batch_tokens=64))
    batcher.offer(1, [64] * 4, now=0.0, bulk=True)
    for tick in range(8):
        batcher.offer(100 + tick, [64], now=0.5 * tick)
    order = [next(iter(owners(batch))) for batch in drain(batcher, now=10.0)]
    # Bulk of time 0 goes with online of time 2 (BULK_DELAY_S), before what came later.
    assert order[:4] == [100, 101, 102, 103]
    assert order.index(1) == 4
    assert order[-1] == 107


def test_a_query_overtakes_the_tail_of_a_large_request():
    batcher = MicroBatcher(Limits(batch_tokens=256))
    batcher.offer(1, [256] * 100, now=0.0)
    batcher.offer(2, [256], now=0.1)
    order = [next(iter(owners(batch))) for batch in drain(batcher, now=10.0)]
    assert 5 <= order.index(2) <= 12


def test_priority_goes_first():
    batcher = MicroBatcher(Limits(batch_tokens=10))
    for owner, priority in enumerate((0, 5, -5)):
        batcher.offer(owner, [10], now=0.0, priority=priority)
    assert [next(iter(owners(batch))) for batch in drain(batcher)] == [1, 0, 2]


def test_free_replicas_share_by_tokens():
    batcher = MicroBatcher(Limits(batch_tokens=8192))
    batcher.offer(1, [100] * 40, now=0.0)
    shares = [sum(item.length for item in batcher.take(0.0, free, 0).items) for free in (4, 3, 2, 1)]
    assert sum(shares) == 4000
    assert max(shares) - min(shares) <= 100


def test_a_full_queue_says_when_to_come_again_and_takes_nothing():
    batcher = MicroBatcher(Limits(queue_tokens=1000, queue_rows=100))
    batcher.offer(1, [500], now=0.0)
    with pytest.raises(MeshError) as refused:
        batcher.offer(2, [300, 300], now=0.0, tokens_per_s=100)
    assert refused.value.reason is Reason.INSTANCE_FULL
    assert refused.value.retry_after_s == pytest.approx(1.25)
    assert (len(batcher), batcher.tokens) == (1, 500)
    with pytest.raises(MeshError):
        batcher.offer(3, [1] * 100, now=0.0)


def test_a_request_larger_than_the_queue_is_taken_when_it_is_empty():
    batcher = MicroBatcher(Limits(queue_tokens=1000))
    batcher.offer(1, [600, 600], now=0.0)
    assert sum(len(batch.items) for batch in drain(batcher)) == 2


def test_who_has_gone_is_not_computed():
    batcher = MicroBatcher(Limits())
    batcher.offer(1, [5, 5], now=0.0)
    batcher.offer(2, [5], now=0.0)
    assert batcher.drop(1) == 2
    assert [owners(batch) for batch in drain(batcher)] == [{2}]
    assert batcher.drop(7) == 0
