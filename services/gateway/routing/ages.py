"""The blocks that one instance is thought to hold, by when they were used last."""

from __future__ import annotations

AGE = 4  # so many ages make a capacity; least recently used is told by age
MOST_AGES = 6


class Slot:
    """One instance. `told`: it sends cache frames. `tells`: its usage has named cached tokens.

    `ages`: the blocks by when they were used last, the newest age at the end. In an age a block stands before those
    that continue it, and it is never of an older age than they are; so taking from the end of the oldest age forgets
    the end of a prefix before its start. Each key is its own value, so that a block keeps its one int object.
    """

    __slots__ = ("ages", "bit", "capacity", "epoch", "id", "nominal", "number", "tells", "told")

    def __init__(self, id: str, number: int, nominal: int) -> None:
        self.id = id
        self.number = number
        self.bit = 1 << number
        self.nominal = self.capacity = nominal
        self.ages: list[dict[int, int]] = [{}]
        self.epoch = 0
        self.told = self.tells = False

    @property
    def size(self) -> int:
        return sum(map(len, self.ages))

    def take(self, key: int) -> int | None:
        """Removes a block. Returns the key's own object."""
        for age in reversed(self.ages):
            known = age.pop(key, None)
            if known is not None:
                return known
        return None

    def grow_older(self) -> None:
        """Begins a new age when the newest is full."""
        ages = self.ages
        if len(ages[-1]) * AGE < self.capacity:
            return
        ages.append({})
        if len(ages) > MOST_AGES:
            older = ages.pop(0)
            ages[0].update(older)
