"""Which blocks of prefix chains an instance holds in its KV cache: what `cache` frames tell to gateways. Pure.

Gateways know prompts by the hashes of their chains, engines by the keys of their KV blocks, which are over tokens
and of another size. Each request that came with a chain ties the two together: the block of the engine in which a
block of the chain ends stands for it. From then on the engine reports what is stored and what is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import ceil

from infermesh.v1 import worker_pb2 as wk

FRAME = 4096  # hashes in one frame, at most: 36 KB
JOURNAL = 1 << 16  # changes kept; a gateway that is further behind gets a snapshot
MOST = 1 << 16  # chain blocks tied, at most


class HeldPrefixes:
    """`live` once the engine reports; before that nothing is known, and no frame says that nothing is held."""

    def __init__(self) -> None:
        self.live = False
        self._epoch = 1
        self._stored: set[int] = set()  # keys of the engine
        self._keys: dict[int, int] = {}  # hash -> key, in the order in which they were tied
        self._hashes: dict[int, list[int]] = {}  # key -> its hashes
        self._journal: list[int] = []  # 2 * hash + (1 if added)
        self._first = 0  # number of the journal's first entry

    # -- what the engine says ---------------------------------------------------------------------------------------

    def stored(self, key: int) -> None:
        self._stored.add(key)
        for hash in self._hashes.get(key, ()):
            self._note(hash, True)

    def removed(self, key: int) -> None:
        self._stored.discard(key)
        for hash in self._hashes.pop(key, ()):
            del self._keys[hash]
            self._note(hash, False)

    def cleared(self) -> None:
        """The cache is empty, or nothing is known of it any more."""
        self._stored.clear()
        self._keys.clear()
        self._hashes.clear()
        self._first += len(self._journal) + 1
        self._journal.clear()
        self._epoch += 1

    # -- what requests say ------------------------------------------------------------------------------------------

    def tie(self, chain: Sequence[int], share: float, tokens: int, keys: Sequence[int], block: int) -> None:
        """A prompt of `tokens` tokens. `share`: the part of it that one block of its chain is; `keys`: of the engine's
        full blocks of `block` tokens, in order."""
        if not keys:
            return
        last = len(keys) - 1
        for at, hash in enumerate(chain, 1):
            key = keys[min(last, ceil(min(1.0, at * share) * tokens / block) - 1)]
            known = self._keys.get(hash)
            if known == key or known in self._stored:
                continue
            if known is not None:
                self._untie(hash)
            self._keys[hash] = key
            self._hashes.setdefault(key, []).append(hash)
            if key in self._stored:
                self._note(hash, True)
        if len(self._keys) > MOST:
            self._make_room()

    # -- what gateways hear -----------------------------------------------------------------------------------------

    @property
    def held(self) -> list[int]:
        """All hashes that are cached; the beginning of a prefix before what continues it."""
        return [hash for hash, key in self._keys.items() if key in self._stored]

    def frames(self, seen: int | None) -> tuple[list[wk.Cache], int | None]:
        """What changed since `seen` (None: tell everything), and what to give the next time."""
        if not self.live:
            return [], None
        now = self._first + len(self._journal)
        if seen is None or seen < self._first:
            return list(self._cut(self.held, [], snapshot=True)), now
        changes: dict[int, int] = {}
        for entry in self._journal[seen - self._first :]:
            changes.pop(entry >> 1, None)
            changes[entry >> 1] = entry & 1
        added = [hash for hash, there in changes.items() if there]
        removed = [hash for hash, there in changes.items() if not there]
        return list(self._cut(added, removed, snapshot=False)), now

    def _cut(self, added: Sequence[int], removed: Sequence[int], *, snapshot: bool) -> Iterator[wk.Cache]:
        for at in range(0, len(removed), FRAME):
            yield wk.Cache(removed=removed[at : at + FRAME], epoch=self._epoch)
        for at in range(0, len(added) or snapshot, FRAME):
            yield wk.Cache(added=added[at : at + FRAME], snapshot=snapshot and not at, epoch=self._epoch)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _note(self, hash: int, there: bool) -> None:
        self._journal.append(2 * hash + there)
        if len(self._journal) > 2 * JOURNAL:
            del self._journal[:JOURNAL]
            self._first += JOURNAL

    def _untie(self, hash: int) -> None:
        key = self._keys.pop(hash)
        others = self._hashes[key]
        others.remove(hash)
        if not others:
            del self._hashes[key]
        if key in self._stored:
            self._note(hash, False)

    def _make_room(self) -> None:
        """Forgets the oldest ties: first those whose prompts were never computed, the latest quarter apart, which may
        be still."""
        surplus = len(self._keys) - MOST + MOST // 16
        older = islice(self._keys.items(), len(self._keys) - MOST // 4)
        idle = list(islice((hash for hash, key in older if key not in self._stored), surplus))
        self._untie_all(idle)
        self._untie_all(list(islice(self._keys, max(0, surplus - len(idle)))))

    def _untie_all(self, hashes: Iterable[int]) -> None:
        for hash in hashes:
            self._untie(hash)
