"""The state of an instance, from four voices: its Link, its drain, the registry, and our own doubts.

Minimal on purpose: ejection statistics, watchdogs and probation join the voices later.
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


class Doubt(Enum):
    NONE = "none"
    PROBING = "probing"  # a call broke while the Link stood; a probe is out
    FAILED = "failed"  # the probe was not answered well; each load frame asks again


UNREGISTERED_GRACE_S = 30.0  # an instance that lives though the registry forgot it: Consul was wiped, it will come back


@dataclass(slots=True)
class Voices:
    link: Link = Link.NEW
    draining: bool = False
    registered: bool = True
    passing: bool = True
    doubt: Doubt = Doubt.NONE
    unregistered_at: float = 0.0

    def state(self) -> State:
        if self.draining:
            return State.DRAINING
        if self.link is Link.DOWN or self.doubt is Doubt.FAILED:
            return State.LOST
        if self.link is Link.NEW:
            return State.STARTING if self.doubt is Doubt.NONE else State.LOST
        vouched = self.registered and self.passing and self.doubt is Doubt.NONE
        return State.HEALTHY if vouched else State.SUSPECT

    def over(self, now: float) -> bool:
        """Nobody vouches for it any more."""
        if self.link is Link.UP and self.doubt is not Doubt.FAILED:
            return not self.registered and now - self.unregistered_at >= UNREGISTERED_GRACE_S
        return not self.registered or (not self.passing and self.link is not Link.NEW)
