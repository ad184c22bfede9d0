"""The state of an instance: what the registry, its Link, its drain and the operator say, and what we think of it.

What we think is its standing, a small state machine (`TABLE`). The words of the others are facts that overrule it. On
top come rules about the pool: not too many are taken out on mere suspicion (judge.py), and where too few are left, the
least bad serve again (panic.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    STARTING = "starting"
    HEALTHY = "healthy"
    SUSPECT = "suspect"  # something is odd; takes work only where nobody is healthy
    EJECTED = "ejected"  # it answers, or may, and does not do its work
    PROBATION = "probation"  # one request at a time, until one went well
    DRAINING = "draining"
    BANNED = "banned"
    LOST = "lost"  # nothing leads there


class Link(Enum):
    NEW = "new"  # not yet answered in this life
    UP = "up"
    DOWN = "down"


class Standing(Enum):
    SOUND = "sound"
    DOUBTED = "doubted"
    OUT = "out"
    TRIAL = "trial"


class Signal(Enum):
    DOUBT = "doubt"  # something is odd
    CLEARED = "cleared"  # and it was nothing, or it is over
    CONVICTED = "convicted"  # enough to take it out
    ADMITTED = "admitted"  # its time is over and it answers: one request may show the rest
    PROVEN = "proven"  # that request went well


TABLE: dict[tuple[Standing, Signal], Standing] = {
    (Standing.SOUND, Signal.DOUBT): Standing.DOUBTED,
    (Standing.SOUND, Signal.CONVICTED): Standing.OUT,
    (Standing.DOUBTED, Signal.CLEARED): Standing.SOUND,
    (Standing.DOUBTED, Signal.CONVICTED): Standing.OUT,
    (Standing.OUT, Signal.CLEARED): Standing.SOUND,
    (Standing.OUT, Signal.ADMITTED): Standing.TRIAL,
    (Standing.TRIAL, Signal.DOUBT): Standing.OUT,
    (Standing.TRIAL, Signal.CONVICTED): Standing.OUT,
    (Standing.TRIAL, Signal.PROVEN): Standing.SOUND,
}  # anything else changes nothing


class Cause(Enum):
    """Why an instance takes no more work: the label of the metric."""

    LOST = "lost"  # its Link broke
    IDENTITY = "identity"  # it answers as another instance, or with another model
    SILENT = "silent"  # its health does not answer in time
    NO_PROGRESS = "no_progress"  # work in flight, and nothing moves
    FAILURES = "failures"
    DYING = "dying"  # one life after the other
    GONE = "gone"  # nobody vouches for it any more
    LEFT = "left"  # drained, or said goodbye
    BANNED = "banned"

    @property
    def evident(self) -> bool:
        """Its end would be as plain as its beginning, so that a first time costs no time out."""
        return self in (Cause.LOST, Cause.SILENT, Cause.DYING)


UNREGISTERED_GRACE_S = 30.0  # an instance that lives though the registry forgot it: Consul was wiped, it will come back
PASSES = 2  # probes in a row that an ejected one must answer


@dataclass(slots=True)
class Voices:
    """`cause`, `why`: of a standing that is not sound. `until`: before then an ejected one is not asked. `passes`: good
    probes since it was. `mute`: the last one was not answered well. `banned`: who banned it and why, empty = nobody."""

    link: Link = Link.NEW
    draining: bool = False
    registered: bool = True
    passing: bool = True
    banned: str = ""
    unregistered_at: float = 0.0
    standing: Standing = Standing.SOUND
    cause: Cause | None = None
    why: str = ""
    until: float = 0.0
    passes: int = 0
    mute: bool = False

    def signal(self, signal: Signal) -> bool:
        """Whether it changed the standing."""
        after = TABLE.get((self.standing, signal), self.standing)
        if after is self.standing:
            return False
        self.standing, self.passes = after, 0
        if after is Standing.SOUND:
            self.cause, self.why = None, ""
        return True

    def state(self) -> State:
        if self.banned:
            return State.BANNED
        if self.draining:
            return State.DRAINING
        if self.link is Link.DOWN:
            return State.LOST
        if self.standing is Standing.OUT:
            return State.EJECTED
        if self.link is Link.NEW:
            return State.STARTING
        if self.standing is Standing.TRIAL:
            return State.PROBATION
        vouched = self.registered and self.passing and self.standing is Standing.SOUND
        return State.HEALTHY if vouched else State.SUSPECT

    def reason(self) -> str:
        """Why it is in its state; empty where that says it all."""
        state = self.state()
        if state is State.BANNED:
            return self.banned
        if state is State.SUSPECT and self.standing is Standing.SOUND:
            return "the registry holds it for unwell" if self.registered else "the registry does not know it"
        return "" if state in (State.HEALTHY, State.STARTING, State.DRAINING) else self.why

    def over(self, now: float) -> bool:
        """Nobody vouches for it any more."""
        if self.link is Link.UP and not self.mute:
            return not self.registered and now - self.unregistered_at >= UNREGISTERED_GRACE_S
        return not self.registered or (not self.passing and self.link is not Link.NEW)
