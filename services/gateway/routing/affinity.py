"""Who holds which prefix in its KV cache: an inverted index from block hashes to sets of instances.

What a decision inserts is only noted at first, and entered at the next end of a request or tick: a decision should not
wait for bookkeeping.

Everything a block costs is an entry in two dicts of ints: `hash -> bit mask of instances`, and, for each instance,
`hash -> hash` by age. No object a block, so the garbage collector has nothing to walk. Dicts stay small enough (shards,
ages) that growing one never holds the event loop for long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

from services.gateway.routing.ages import Slot

BLOCK_TOKENS = 128  # of a chain's block, where nobody says: 512 bytes at 4 bytes a token
PRIOR_BLOCKS = 4096  # capacity of an instance that does not tell its own
LARGEST = 1 << 15  # blocks tracked of one instance
BYTES = 250  # of memory a tracked block, at most; measured by tests/bench/prefix.py
SHARDS = 16  # a power of two
HINT_SHARE = 0.25  # of the prompt that the holder of a hinted document or session is thought to have
NOTED = 8  # prompts noted and not yet entered; with more, each insert enters the oldest
PURGE = 256  # blocks of forgotten instances that each insert cleans up
SHRINK, GROW = 0.9, 1.1  # of the assumed capacity, after a report of fewer or more cached blocks than expected
_MASK = (1 << 60) - 1
_SHARD = SHARDS - 1


class PrefixIndex:
    """Bounded in entries (a block on an instance is one) and, at `BYTES` each, in bytes."""

    def __init__(
        self, max_entries: int = 400_000, max_bytes: int = 100_000_000, block_tokens: int = BLOCK_TOKENS
    ) -> None:
        self._bound = min(max_entries, max_bytes // BYTES)
        self._block_tokens = block_tokens
        self._masks: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        self._slots: dict[str, Slot] = {}
        self._numbers: list[Slot | None] = []
        self._alive = 0
        self._dying: list[Slot] = []
        self._entries = 0
        self._noted: list[tuple[Slot, Sequence[int]]] = []

    def __len__(self) -> int:
        """Entries, those of forgotten instances included until they are cleaned up."""
        self.settle()
        return self._entries

    def blocks(self, instance: str) -> int:
        """How many blocks the instance is thought to hold."""
        self.settle()
        slot = self._slots.get(instance)
        return slot.size if slot is not None else 0

    def track(self, instance: str, kv_tokens: int = 0) -> None:
        """Makes the instance known, or changes its capacity; 0 = unknown. What is not tracked holds nothing."""
        nominal = min(kv_tokens // self._block_tokens, LARGEST) if kv_tokens else PRIOR_BLOCKS
        self.settle()
        slot = self._slots.get(instance)
        if slot is None:
            self._slots[instance] = self._new_slot(instance, nominal)
        elif slot.nominal != nominal:
            slot.nominal = slot.capacity = nominal
            self._trim(slot)

    def forget(self, instance: str) -> None:
        """It is gone, or lives anew with an empty cache."""
        self.settle()
        slot = self._slots.pop(instance, None)
        if slot is not None:
            self._bury(slot)

    # -- asking -----------------------------------------------------------------------------------------------------

    def match(self, chain: Sequence[int]) -> list[tuple[str, int]]:
        """(instance, blocks from the chain's start that it holds), most first; those that hold none are left out."""
        masks, left, depth = self._masks, self._alive, 0
        found: list[tuple[str, int]] = []
        before = -1
        for key in chain:
            mask = masks[key & _SHARD].get(key, 0)
            if mask is not before:  # neighbours mostly share one int
                before = mask
                if mask & left != left:
                    if depth:
                        found += [(id, depth) for id in self._ids(left & ~mask)]
                    left &= mask
                    if not left:
                        break
            depth += 1
        if left and depth:
            found += [(id, depth) for id in self._ids(left)]
        found.reverse()
        return self._with_noted(chain, found) if self._noted and chain else found

    def _with_noted(self, chain: Sequence[int], found: list[tuple[str, int]]) -> list[tuple[str, int]]:
        first = chain[0]
        more = {
            slot.id: shared_blocks(known[: slot.capacity], chain)
            for slot, known in self._noted
            if known and known[0] == first
        }
        if not more:
            return found
        held = dict(found)
        for id, blocks in more.items():
            held[id] = max(blocks, held.get(id, 0))
        return sorted(held.items(), key=_depth, reverse=True)

    def holders(self, key: int) -> list[str]:
        """The instances that hold one block, or have met a hint's key."""
        self.settle()
        return self._ids(self._masks[key & _SHARD].get(key, 0) & self._alive)

    def shares(self, chain: Sequence[int], chain_share: float, hints: Sequence[int] = ()) -> dict[str, float]:
        """The part of the prompt, 0 .. 1, that each instance is thought to hold. Hints count where the chain finds
        nobody: the first that anybody has met."""
        found = self.match(chain)
        if found:
            return {id: min(1.0, blocks * chain_share) for id, blocks in found}
        for key in hints:
            if ids := self.holders(key):
                return dict.fromkeys(ids, HINT_SHARE)
        return {}

    # -- learning ---------------------------------------------------------------------------------------------------

    def insert(self, instance: str, chain: Sequence[int]) -> None:
        """The instance is about to compute these blocks. The end of a chain is forgotten before its start."""
        slot = self._slots.get(instance)
        if slot is None:
            return
        self._noted.append((slot, chain))
        if len(self._noted) > NOTED:
            self._enter(*self._noted.pop(0))

    def settle(self) -> None:
        """Enters what was noted."""
        if self._noted:
            noted, self._noted = self._noted, []
            for slot, chain in noted:
                self._enter(slot, chain)

    def _enter(self, slot: Slot, chain: Sequence[int]) -> None:
        if self._dying:
            self._purge(PURGE)
        self._add(slot, chain if len(chain) <= slot.capacity else chain[: slot.capacity])
        self._trim(slot)

    def cache_frame(
        self, instance: str, added: Iterable[int], removed: Iterable[int], snapshot: bool = False, epoch: int = 0
    ) -> None:
        """What the instance says itself. `added`: a block before those that continue it. A snapshot replaces all that
        was thought; a frame of another epoch than the last snapshot's speaks of a cache that is no more."""
        self.settle()
        slot = self._slots.get(instance)
        if slot is None:
            return
        if snapshot:
            fresh = self._slots[instance] = self._new_slot(instance, slot.nominal)
            fresh.epoch, fresh.tells = epoch, slot.tells
            self._bury(slot)
            slot = fresh
        elif slot.epoch != epoch:
            return
        if not slot.told:  # its word counts, ours only bounds the memory
            slot.told = True
            slot.capacity = min(2 * slot.nominal, LARGEST)
        for key in removed:
            if slot.take(key) is not None:
                self._clear(slot, key)
        self._add(slot, added)
        self._trim(slot)

    def learn(self, instance: str, chain: Sequence[int], expected: int, cached: int, computed: bool) -> None:
        """The end of an attempt: `expected` blocks were matched when it was sent, `cached` is what the instance found,
        `computed` tells whether its first token came.

        What was not computed is dropped beyond `expected`. Fewer cached blocks than expected mean that the instance
        forgets sooner than its capacity says (others use it too): the assumed capacity shrinks, and with it go the
        blocks used longest ago; more let it grow again. Frames make this guess needless.
        """
        self.settle()
        slot = self._slots.get(instance)
        if slot is None or not chain:
            return
        if not computed:
            for key in chain[expected:]:
                if slot.take(key) is not None:
                    self._clear(slot, key)
            return
        slot.tells = slot.tells or cached > 0
        if slot.told or not slot.tells:
            return
        if cached + 1 < expected:  # one block is rounding
            slot.capacity = max(1, int(slot.capacity * SHRINK))  # from none it could never grow again
            self._trim(slot)
        elif cached > expected or (cached and slot.capacity < slot.nominal):
            slot.capacity = min(slot.nominal, int(slot.capacity * GROW) + 8)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _ids(self, mask: int) -> list[str]:
        found = []
        numbers = self._numbers
        while mask:
            low = mask & -mask
            slot = numbers[low.bit_length() - 1]
            if slot is not None:
                found.append(slot.id)
            mask ^= low
        return found

    def _add(self, slot: Slot, keys: Iterable[int]) -> None:
        newest, bit, masks = slot.ages[-1], slot.bit, self._masks
        ages = slot.ages[-2::-1]
        seen = -1  # neighbours mostly have the same holders, and then share one int
        made = new = 0
        for key in keys:
            if key in newest:
                continue
            shard = masks[key & _SHARD]
            mask = shard.get(key)
            if mask is None:
                shard[key] = bit
            elif mask & bit:
                for age in ages:
                    if (known := age.pop(key, None)) is not None:
                        newest[known] = known
                        break
                continue
            else:
                if mask != seen:
                    seen, made = mask, mask | bit
                shard[key] = made
            newest[key] = key
            new += 1
        self._entries += new
        slot.grow_older()

    def _clear(self, slot: Slot, key: int) -> None:
        shard = self._masks[key & _SHARD]
        mask = shard[key] & ~slot.bit
        if mask:
            shard[key] = mask
        else:
            del shard[key]
        self._entries -= 1

    def _trim(self, slot: Slot) -> None:
        size = slot.size
        if size > slot.capacity:
            self._drop(slot, size - slot.capacity)
        while (over := self._entries - self._bound) > 0:
            if self._dying:
                self._purge(over)
                continue
            largest = max(self._slots.values(), key=_size)
            self._drop(largest, max(over, largest.size // 64))

    def _drop(self, slot: Slot, count: int) -> None:
        """Forgets what was used longest ago; as much as there is."""
        ages, bit, masks = slot.ages, slot.bit, self._masks
        before = slot.size
        for _ in range(min(count, before)):
            while not ages[0]:
                del ages[0]
            key = ages[0].popitem()[0]
            shard = masks[key & _SHARD]
            mask = shard[key]
            if mask == bit:
                del shard[key]
            else:
                shard[key] = mask ^ bit
        self._entries -= min(count, before)

    def _new_slot(self, instance: str, nominal: int) -> Slot:
        number = next((at for at, slot in enumerate(self._numbers) if slot is None), len(self._numbers))
        slot = Slot(instance, number, nominal)
        if number == len(self._numbers):
            self._numbers.append(slot)
        else:
            self._numbers[number] = slot
        self._alive |= slot.bit
        return slot

    def _bury(self, slot: Slot) -> None:
        """Out of sight at once; its entries and its bit come free little by little."""
        self._alive &= ~slot.bit
        self._dying.append(slot)
        self._purge(PURGE)

    def _purge(self, count: int) -> None:
        while self._dying and count > 0:
            slot = self._dying[-1]
            before = slot.size
            self._drop(slot, count)
            count -= before
            if not slot.size:
                self._dying.pop()
                self._numbers[slot.number] = None


def _size(slot: Slot) -> int:
    return slot.size


def _depth(found: tuple[str, int]) -> int:
    return found[1]


def shared_blocks(a: Sequence[int], b: Sequence[int]) -> int:
    """Blocks of the common beginning. Each hash is over all before it, so equality is decided by halving."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[middle - 1] == b[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def hint_keys(tenant: str, document_id: str, session_id: str) -> tuple[int, ...]:
    """What hints are known by in the index: inserted beside the chain, asked for where the chain finds nobody."""
    named = (("session", session_id), ("document", document_id))
    return tuple(xxh3_64_intdigest(f"{kind}\0{tenant}\0{id}".encode()) & _MASK for kind, id in named if id)


def cached_blocks(cached_tokens: int, prompt_tokens: int, chain_share: float) -> int:
    """Blocks of the chain that so many cached tokens are."""
    return round(cached_tokens / (prompt_tokens * chain_share)) if prompt_tokens and chain_share else 0
