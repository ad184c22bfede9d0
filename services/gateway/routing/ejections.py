"""How long an instance stays out: longer each time, over all its lives, and never to the same moment everywhere.

The time doubles from 5 s to 60 s (Envoy and Linkerd do the same), ±20 % by a hash of who, how often and a salt of this
gateway, so that equal calls give equal answers and gateways do not come back all at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

FIRST_S, LONGEST_S = 5.0, 60.0
JITTER = 0.2
FORGIVE_S = 10.0  # of good conduct take one strike away, as in Envoy
FORGET_S = 600.0  # an id that ended and did not come back
RAMP_S = 30.0  # slow start: Envoy's formula with aggression 1
RAMP_FROM = 0.1


@dataclass(slots=True)
class Strikes:
    count: int = 0
    until: float = 0.0  # when its last time out ends


@dataclass(slots=True)
class Ejections:
    salt: str = ""
    strikes: dict[str, Strikes] = field(default_factory=dict)
    ended: dict[str, tuple[int, float]] = field(default_factory=dict)  # the last life that did not leave by itself

    def strike(self, id: str, now: float, *, free: bool = False) -> float:
        """Counts one. Returns when its time is over; `free`: the first one costs none."""
        found = self.strikes.setdefault(id, Strikes())
        found.count += 1
        found.until = now + self.term_s(id, found.count - free)
        return found.until

    def died(self, id: str, incarnation: int, now: float) -> None:
        """A life ended, and nobody asked it to; or so it seems: only another life of the same id proves it."""
        self.ended[id] = (incarnation, now)

    def born(self, id: str, incarnation: int, now: float) -> None:
        """A life begins, or comes back."""
        before = self.ended.pop(id, None)
        if before is not None and before[0] != incarnation:
            self.strike(id, now, free=True)

    def term_s(self, id: str, count: int) -> float:
        if count <= 0:
            return 0.0
        chance = crc32(f"{self.salt}\0{id}\0{count}".encode()) / 2**32
        return min(LONGEST_S, FIRST_S * 2.0 ** min(count - 1, 10)) * (1 - JITTER + 2 * JITTER * chance)

    def until(self, id: str) -> float:
        found = self.strikes.get(id)
        return found.until if found is not None else 0.0

    def count(self, id: str) -> int:
        found = self.strikes.get(id)
        return found.count if found is not None else 0

    def forgive(self, now: float) -> None:
        """Good conduct. To be called now and then."""
        for id, (_, at) in list(self.ended.items()):
            if now - at >= FORGET_S:
                del self.ended[id]
        for id, found in list(self.strikes.items()):
            if now - found.until >= FORGIVE_S:
                found.count -= 1
                found.until = now
                if not found.count:
                    del self.strikes[id]


def ramp(age_s: float) -> float:
    """The share of its weight that an instance has, so long after it came or came back."""
    return min(1.0, max(RAMP_FROM, age_s / RAMP_S))
