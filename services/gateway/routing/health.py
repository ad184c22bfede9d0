"""The state of an instance, as a table of four voices: its Link, its drain, the registry, and our own doubts.

Minimal on purpose: ejection statistics, watchdogs and probation join the voices later without changing the table's use.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    STARTING = "starting"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DRAINING = "draining"
    LOST = "lost"


class Link(Enum):
    NEW = "new"  # not yet answered in this life
    UP = "up"
    DOWN = "down"


UNREGISTERED_GRACE_S = 30.0  # an instance that lives though the registry forgot it: Consul was wiped, it will come back


@dataclass(slots=True)
class Voices:
    link: Link = Link.NEW
    draining: bool = False
    registered: bool = True
    passing: bool = True
    doubted: bool = False  # a call broke while the Link stood; a probe is out
    unregistered_at: float = 0.0

    def state(self) -> State:
        if self.draining:
            return State.DRAINING
        return _TABLE[self.link, self.registered and self.passing, self.doubted]

    def over(self, now: float) -> bool:
        """Nobody vouches for it any more."""
        if self.link is Link.UP:
            return not self.registered and now - self.unregistered_at >= UNREGISTERED_GRACE_S
        return not self.registered or (not self.passing and self.link is Link.DOWN)


# (Link, the registry vouches, doubted) -> state
_TABLE: dict[tuple[Link, bool, bool], State] = {
    (Link.NEW, True, False): State.STARTING,
    (Link.NEW, True, True): State.LOST,
    (Link.NEW, False, False): State.STARTING,
    (Link.NEW, False, True): State.LOST,
    (Link.UP, True, False): State.HEALTHY,
    (Link.UP, True, True): State.SUSPECT,
    (Link.UP, False, False): State.SUSPECT,
    (Link.UP, False, True): State.SUSPECT,
    (Link.DOWN, True, False): State.LOST,
    (Link.DOWN, True, True): State.LOST,
    (Link.DOWN, False, False): State.LOST,
    (Link.DOWN, False, True): State.LOST,
}
