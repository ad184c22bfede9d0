"""The scripted engine's KV room: blocks of 16 tokens, shared by prefix, forgotten least recently used first. Pure.

A block's key is the hash of its tokens and of the block before it, so equal keys mean equal prefixes (and equal salts).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

BLOCK = 16


def extend_chain(chain: list[int], token_ids: Sequence[int], salt: bytes) -> None:
    """Appends the keys of all full blocks of `token_ids` that `chain` lacks."""
    parent = chain[-1] if chain else hash(salt)
    for at in range(len(chain) * BLOCK, len(token_ids) - BLOCK + 1, BLOCK):
        parent = hash((parent, *token_ids[at : at + BLOCK]))
        chain.append(parent)


@dataclass(slots=True)
class Lease:
    """The blocks of one request: `shared` by their keys in order, `private` ones that nobody else can see yet."""

    private: int
    shared: list[int] = field(default_factory=list)


_ABSENT = object()


def _nobody(key: int) -> None:
    pass


class Blocks:
    """All blocks of the engine. Blocks in use are never forgotten, the others only when room is needed."""

    def __init__(
        self, capacity: int, stored: Callable[[int], None] = _nobody, removed: Callable[[int], None] = _nobody
    ) -> None:
        """`stored`, `removed`: told each key that comes into the cache or is forgotten."""
        self.capacity = capacity
        self._stored = stored
        self._removed = removed
        self._users: dict[int, int] = {}  # key -> requests that hold it
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, held by nobody; oldest first
        self._private = 0

    @property
    def held(self) -> int:
        """Blocks that running requests hold or have reserved."""
        return len(self._users) + self._private

    @property
    def cached(self) -> int:
        """Blocks that are remembered, held or not."""
        return len(self._users) + len(self._idle)

    def match(self, chain: Sequence[int]) -> int:
        """How many blocks from the start of the chain are cached."""
        for index, key in enumerate(chain):
            if key not in self._users and key not in self._idle:
                return index
        return len(chain)

    def take(self, chain: Sequence[int], blocks: int) -> Lease | None:
        """Reserves `blocks` blocks, of which the cached start of `chain` is shared. None when there is no room now."""
        shared = list(chain[: self.match(chain)])
        woken = sum(key in self._idle for key in shared)
        private = max(0, blocks - len(shared))
        if self.held + woken + private > self.capacity:
            return None
        for key in shared:
            self._hold(key)
        self._private += private
        self._forget()
        return Lease(private, shared)

    def publish(self, lease: Lease, chain: Sequence[int]) -> None:
        """Blocks of the chain that have been computed since become visible to others."""
        for key in chain[len(lease.shared) :]:
            if not lease.private:
                return
            lease.private -= 1
            self._private -= 1
            self._hold(key)
            lease.shared.append(key)

    def give_back(self, lease: Lease) -> None:
        """The request is over. Its computed blocks stay cached; the end of a prefix is forgotten before its start."""
        self._private -= lease.private
        for key in reversed(lease.shared):
            users = self._users[key] - 1
            if users:
                self._users[key] = users
            else:
                del self._users[key]
                self._idle[key] = None
        lease.private = 0
        lease.shared = []
        self._forget()

    def _hold(self, key: int) -> None:
        users = self._users.get(key, 0)
        if self._idle.pop(key, _ABSENT) is _ABSENT and not users:
            self._stored(key)
        self._users[key] = users + 1

    def _forget(self) -> None:
        while self._idle and self.held + len(self._idle) > self.capacity:
            self._removed(self._idle.popitem(last=False)[0])
