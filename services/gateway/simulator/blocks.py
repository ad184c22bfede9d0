"""The KV cache of one instance in blocks: held by running requests, or free but still remembered, least used first.

As vLLM keeps it: a block is shared by its hash, a request's blocks become evictable when it ends, and those of a
prompt's end go before those of its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence


class BlockCache:
    """`capacity` in blocks. Room for the whole answer is taken when a request is let in, so nothing is preempted."""

    def __init__(self, capacity: int) -> None:
        self.capacity = max(1, capacity)
        self.held: dict[int, int] = {}  # hash -> requests that use it
        self.free: dict[int, None] = {}  # hash of a cached block nobody uses, oldest first
        self.anonymous = 0  # held blocks without a hash: answers and unfinished blocks
        self.log: list[tuple[bool, tuple[int, ...]]] | None = None  # (stored, hashes), when somebody listens

    @property
    def in_use(self) -> int:
        return len(self.held) + self.anonymous

    def match(self, chain: Sequence[int]) -> int:
        """How many blocks from the start are here."""
        held, free = self.held, self.free
        count = 0
        for link in chain:
            if link not in held and link not in free:
                break
            count += 1
        return count

    def take(self, chain: Sequence[int], blocks: int) -> int | None:
        """Room for `blocks`, the first of which are `chain`: the number matched, or None when it does not fit now."""
        held, free = self.held, self.free
        fresh = sum(1 for link in chain if link not in held)
        anonymous = max(0, blocks - len(chain))
        if len(held) + self.anonymous + fresh + anonymous > self.capacity:
            return None
        matched = self.match(chain)
        stored: list[int] = []
        for link in chain:
            users = held.get(link)
            if users is not None:
                held[link] = users + 1
                continue
            if link in free:
                del free[link]
            else:
                stored.append(link)
            held[link] = 1
        self.anonymous += anonymous
        removed: list[int] = []
        surplus = len(held) + self.anonymous + len(free) - self.capacity
        if surplus > 0:
            for link in free:
                if len(removed) == surplus:
                    break
                removed.append(link)
            for link in removed:
                del free[link]
        if self.log is not None:
            if removed:
                self.log.append((False, tuple(removed)))
            if stored:
                self.log.append((True, tuple(stored)))
        return matched

    def give_back(self, chain: Sequence[int], blocks: int, computed: int | None = None) -> None:
        """The request is over; its hashed blocks, or as many as are `computed`, stay until the room is wanted."""
        held, free = self.held, self.free
        lost: list[int] = []
        for place in range(len(chain) - 1, -1, -1):
            link = chain[place]
            users = held[link] - 1
            if users:
                held[link] = users
            else:
                del held[link]
                if computed is None or place < computed:
                    free[link] = None
                else:
                    lost.append(link)
        if lost and self.log is not None:
            self.log.append((False, tuple(lost)))
        self.anonymous -= max(0, blocks - len(chain))
