"""Which rows are computed together: a token-budget micro-batcher across requests. Pure.

A batch costs rows x longest row (padded tokens), so rows of like length go together and the sum is bounded. Rows wait
in order of a virtual time, which is all there is to fairness:

    order = arrival + SPREAD x tokens of the same request before this row
          + BULK_DELAY if bulk - PRIORITY_STEP x priority

so a single query goes before the tail of a large request, online goes before bulk, and nothing waits for ever. The
first row in that order is in every batch; a batch led by an online row takes no bulk row. An idle machine waits for
nothing; a small batch is held back up to `wait_s` only while other work runs. Free replicas share what is queued by its
tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from infermesh.errors import MeshError, Reason

BULK_DELAY_S = 2.0  # how long bulk work lets later online work pass
PRIORITY_STEP_S = 0.05
SPREAD_S_PER_TOKEN = 1 / 20_000  # a request's own rows are spread over time as if computed at 20,000 tokens/s
WINDOW_BUDGETS = 4  # the longest waiting rows among which like lengths are sought, in budgets
WINDOW_ROWS = 1024
MIN_SHARE = 256  # padded tokens under which splitting over replicas costs more than it gains
WASTE_FLOOR = 256  # padding that is always tolerated in a batch, tokens
WASTE_SHARE = 0.25  # and beyond it, as a share of the real tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """`batch_tokens`: padded tokens in a batch (a row longer than that goes alone); `queue_tokens`: queued at most."""

    batch_tokens: int = 4096
    batch_rows: int = 256
    wait_s: float = 0.002
    queue_tokens: int = 1 << 20
    queue_rows: int = 1 << 15


class Item(NamedTuple):
    """One queued row, in the order of the queue."""

    order: float
    serial: int
    owner: int
    place: int  # of the row in its request
    length: int
    arrived: float
    bulk: bool
    group: int  # only rows of one group may share a batch


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to be computed together, by rising length."""

    items: tuple[Item, ...]

    @property
    def width(self) -> int:
        return max(item.length for item in self.items)

    @property
    def tokens(self) -> int:
        """Padded: what the batch costs."""
        return self.width * len(self.items)


class MicroBatcher:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._queue: list[Item] = []
        self._tokens = 0
        self._serial = 0

    def __len__(self) -> int:
        """Queued rows."""
        return len(self._queue)

    @property
    def tokens(self) -> int:
        """Queued tokens, without padding."""
        return self._tokens

    def offer(
        self,
        owner: int,
        lengths: Sequence[int],
        now: float,
        *,
        bulk: bool = False,
        priority: int = 0,
        groups: Sequence[int] = (),
        tokens_per_s: float = 0.0,
    ) -> None:
        """Queues the rows of a request, all or none. `groups`: of each row, none = all 0; `tokens_per_s`: the pace at
        which the queue empties.

        Raises:
            MeshError: INSTANCE_FULL, with the time after which there will be room. An empty queue takes any request.
        """
        total = sum(lengths)
        limits = self.limits
        if self._queue and (
            self._tokens + total > limits.queue_tokens or len(self._queue) + len(lengths) > limits.queue_rows
        ):
            over = max(self._tokens + total - limits.queue_tokens, self._tokens // 4)
            after = min(30.0, max(0.1, over / tokens_per_s)) if tokens_per_s > 0 else 1.0
            raise MeshError(
                Reason.INSTANCE_FULL,
                f"the queue is full: {self._tokens} of {limits.queue_tokens} tokens, "
                f"{len(self._queue)} of {limits.queue_rows} inputs",
                retry_after_s=after,
            )
        order = now + (BULK_DELAY_S if bulk else 0.0) - PRIORITY_STEP_S * priority
        fresh = []
        for index, (length, group) in enumerate(zip(lengths, groups or [0] * len(lengths), strict=True)):
            self._serial += 1
            fresh.append(Item(order, self._serial, owner, index, length, now, bulk, group))
            order += SPREAD_S_PER_TOKEN * length
        if len(fresh) == 1:
            insort(self._queue, fresh[0])
        else:
            self._queue = sorted(self._queue + fresh)
        self._tokens += total

    def drop(self, owner: int) -> int:
        """Forgets the queued rows of a caller that has gone. Returns how many."""
        return self._remove(lambda item: item.owner == owner)

    def due(self, now: float, free: int, busy: int) -> float | None:
        """When `take` will give a batch if nothing else happens; None if not before something does."""
        if not self._queue or free <= 0:
            return None
        if not busy or self._tokens >= self.limits.batch_tokens or len(self._queue) >= self.limits.batch_rows:
            return now
        return max(now, min(item.arrived for item in self._queue[:WINDOW_ROWS]) + self.limits.wait_s)

    def take(self, now: float, free: int, busy: int) -> Batch | None:
        """The next batch for one of `free` idle replicas while `busy` batches are being computed."""
        due = self.due(now, free, busy)
        if due is None or due > now:
            return None
        share = max(MIN_SHARE, -(-self._tokens // free))
        window = self._window()
        chosen = _alike(window, self._queue[0], min(self.limits.batch_tokens, share), self.limits.batch_rows)
        taken = {item.serial for item in chosen}
        self._remove(lambda item: item.serial in taken)
        return Batch(tuple(chosen))

    def _window(self) -> list[Item]:
        """The rows that waited longest and may go with the first, by rising length."""
        head = self._queue[0]
        room = WINDOW_BUDGETS * self.limits.batch_tokens
        window = []
        for item in self._queue[:WINDOW_ROWS]:
            if item.group != head.group or (item.bulk and not head.bulk):
                continue
            window.append(item)
            room -= item.length
            if room <= 0:
                break
        return sorted(window, key=_by_length)

    def _remove(self, gone: Callable[[Item], bool]) -> int:
        before = len(self._queue)
        kept = []
        for item in self._queue:
            if gone(item):
                self._tokens -= item.length
            else:
                kept.append(item)
        self._queue = kept
        return before - len(kept)


def _by_length(item: Item) -> tuple[int, int]:
    return item.length, item.serial


def _alike(window: list[Item], head: Item, budget: int, most: int) -> list[Item]:
    """A run of neighbours in length around `head` that holds the budget and wastes little on padding."""
    low = high = bisect_left(window, _by_length(head), key=_by_length)
    real = head.length
    while high - low + 1 < most:
        rows = high - low + 2
        sides = []
        for at in (low - 1, high + 1):
            if not 0 <= at < len(window):
                continue
            width = max(window[high].length, window[at].length)
            waste = width * rows - real - window[at].length
            if width * rows <= budget and waste <= max(WASTE_FLOOR, WASTE_SHARE * real):
                sides.append((waste, at))
        if not sides:
            break
        at = min(sides)[1]
        real += window[at].length
        low, high = min(low, at), max(high, at)
    return window[low : high + 1]
