"""Fairness between tenants: whose turn it is, and how much room one of them may take. Pure; times are seconds.

Both rules cost nothing where there is one tenant, and let a tenant have everything that nobody else wants.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple

FAIRNESS = 1.0  # a second of service that a tenant had beyond the least served one outweighs so many of its work
LATE_S = 1.0  # between tenants; what a request that cannot be on time any more is put back by
MEMORY_S = 10.0  # room that a tenant used stays free for it so long, up to twice as long
MOST_KEPT = 8  # never more than every eighth place
SHALLOW = 4  # of a queue of prompts; who has more than others leaves the rest of it to them
NOBODY: frozenset[str] = frozenset()


class Turns:
    """Start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996), by seconds of service.

    A tenant's tag grows with what it is given. One that comes back is level with the tag that was served last, not
    behind all that others were given meanwhile, and not before those who waited longer.
    """

    def __init__(self) -> None:
        self._tags: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._virtual = 0.0  # tag of the last served, before it was

    def came(self, tenant: str) -> None:
        """One more of its requests waits."""
        if tenant not in self._waiting:
            self._tags[tenant] = self._tag(tenant)
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1

    def left(self, tenant: str) -> None:
        """One of those does not wait any more, whatever became of it."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def served(self, tenant: str, seconds: float) -> None:
        """It was given so much, whether or not it had to wait for it."""
        tag = self._tag(tenant)
        self._virtual = max(self._virtual, tag)
        self._tags[tenant] = tag + seconds

    def ahead(self) -> dict[str, float]:
        """Seconds that each waiting tenant was given beyond the one that was given least; empty where one waits."""
        if len(self._waiting) < 2:
            return {}
        least = min(self._tags[tenant] for tenant in self._waiting)
        return {tenant: self._tags[tenant] - least for tenant in self._waiting}

    def ahead_of(self, tenant: str) -> float:
        """The same for one that may not wait yet."""
        least = min((self._tags[other] for other in self._waiting), default=0.0)
        return max(0.0, self._tag(tenant) - least) if self._waiting else 0.0

    @property
    def waiting(self) -> dict[str, int]:
        """How many of each tenant's."""
        return self._waiting

    def _tag(self, tenant: str) -> float:
        tag = self._tags.get(tenant, 0.0)
        if tenant in self._waiting:
            return tag
        least = min((self._tags[other] for other in self._waiting), default=self._virtual)
        return max(tag, min(self._virtual, least))


class Size(NamedTuple):
    """What a request takes of an instance, or what an instance has; 0: unknown, it bounds nothing."""

    slots: int = 0
    tokens: int = 0  # of KV cache

    def plus(self, other: Size) -> Size:
        return Size(self.slots + other.slots, self.tokens + other.tokens)

    def less(self, other: Size) -> Size:
        return Size(self.slots - other.slots, self.tokens - other.tokens)

    def most(self, other: Size) -> Size:
        return Size(max(self.slots, other.slots), max(self.tokens, other.tokens))


NOTHING = Size()


@dataclass(slots=True)
class _Held:
    used: Size = NOTHING
    most: Size = NOTHING  # at once, in this window of `MEMORY_S`
    before: Size = NOTHING  # in the one before


class Holdings:
    """How much of an instance's room each tenant holds, and held lately."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._window = 0
        self._beyond: Set[str] | None = None  # None: to be found anew

    def see(self, tenant: str) -> None:
        """It wants something here, and has its share although it holds nothing."""
        if tenant not in self._held:
            self._held[tenant] = _Held()
            self._beyond = None

    def take(self, tenant: str, size: Size, now: float) -> None:
        """Until `give`. What takes no room, as tokenising does, is not held: its tenant may be forgotten meanwhile."""
        if not any(size):
            return
        self._roll(now)
        self.see(tenant)
        held = self._held[tenant]
        held.used = held.used.plus(size)
        held.most = held.most.most(held.used)
        self._beyond = None

    def give(self, tenant: str, size: Size) -> None:
        if not any(size):
            return
        held = self._held[tenant]
        held.used = held.used.less(size)
        self._beyond = None

    def beyond(self, whole: Size, now: float) -> Set[str]:
        """Tenants that hold more than the mean of all who were seen lately, by the resource of which each holds
        the larger share (dominant resource fairness: Ghodsi et al., NSDI 2011). They go after the others."""
        if len(self._held) > 1:
            self._roll(now)  # which may leave one, or none
        if len(self._held) < 2:
            return NOBODY
        if self._beyond is not None:
            return self._beyond
        shares = {
            tenant: max(held.used.slots / (whole.slots or 1e9), held.used.tokens / (whole.tokens or 1e12))
            for tenant, held in self._held.items()
        }
        mean = sum(shares.values()) / len(shares)
        self._beyond = {tenant for tenant, share in shares.items() if share > mean * (1 + 1e-9)}
        return self._beyond

    def kept(self, tenant: str, whole: Size, now: float) -> Size:
        """What must stay free beside a further request of this tenant, which is beyond its share: what the others used
        lately and do not use now."""
        slots = tokens = 0
        for other, held in self._held.items():
            if other != tenant:
                lately = held.most.most(held.before)
                slots += lately.slots - held.used.slots
                tokens += lately.tokens - held.used.tokens
        return Size(min(slots, -(-whole.slots // MOST_KEPT)), min(tokens, whole.tokens // MOST_KEPT))

    def used(self) -> int:
        return sum(sum(held.used) for held in self._held.values())

    def _roll(self, now: float) -> None:
        window = int(now / MEMORY_S)
        if window == self._window:
            return
        for tenant, held in list(self._held.items()):
            held.before = held.most if window == self._window + 1 else held.used
            held.most = held.used
            if not any(held.before) and not any(held.used):
                del self._held[tenant]
        self._window = window
        self._beyond = None
