"""When a child is started, restarted, given up and stopped. Pure: time is an argument, what is to be done comes back.

STARTING -> READY -> (dies) -> BACKOFF -> STARTING …          FAILED: not worth another try
any -> STOPPING -> STOPPED                                    STOPPED also: it ended by itself with code 0 (drained)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

BAD_CONFIG = 2  # the exit code of a child that cannot run as configured


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Effect(StrEnum):
    """START a new process; TERMINATE: SIGTERM to the leader alone; SWEEP: kill whatever is left of its session."""

    START = "start"
    TERMINATE = "terminate"
    SWEEP = "sweep"


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds between a death and the restart: `first_s`, times `factor` each time, at most `most_s`. A child that was
    ready for `stable_s` begins anew. One that never got ready is given up after `early_deaths`, or at once when it says
    that it cannot run as configured. `grace_s` is what a stopping child may take.
    """

    first_s: float = 0.5
    factor: float = 2.0
    most_s: float = 30.0
    stable_s: float = 60.0
    early_deaths: int = 3
    grace_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Child:
    """One child over all its lives. `since`: when it came into this state."""

    id: str
    state: State = State.STARTING
    since: float = 0.0
    deaths: int = 0  # in a row
    restarts: int = 0  # in all
    restart_at: float = 0.0
    ever_ready: bool = False
    exit_code: int | None = None  # of its last life

    @property
    def settled(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in (State.FAILED, State.STOPPED)


Step = tuple[Child, tuple[Effect, ...]]


def begin(id: str, now: float) -> Step:
    return Child(id, State.STARTING, now), (Effect.START,)


def ready(child: Child, now: float) -> Step:
    """It says that it serves."""
    if child.state is not State.STARTING:
        return child, ()
    return replace(child, state=State.READY, since=now, ever_ready=True), ()


def exited(child: Child, code: int, now: float, policy: Policy) -> Step:
    """Its leader is gone; what it left behind is swept before anything else happens."""
    stable = child.state is State.READY and now - child.since >= policy.stable_s
    deaths = 1 if stable else child.deaths + 1
    child = replace(child, since=now, deaths=deaths, exit_code=code)
    if child.state is State.STOPPING or code == 0:
        return replace(child, state=State.STOPPED), (Effect.SWEEP,)
    if not child.ever_ready and (code == BAD_CONFIG or deaths >= policy.early_deaths):
        return replace(child, state=State.FAILED), (Effect.SWEEP,)
    return replace(child, state=State.BACKOFF, restart_at=now + delay(deaths, policy)), (Effect.SWEEP,)


def delay(deaths: int, policy: Policy) -> float:
    """Seconds until the restart after so many deaths in a row."""
    exponent = min(deaths - 1, 64)  # a float has room for no more
    return min(policy.most_s, policy.first_s * policy.factor**exponent)


def tick(child: Child, now: float, policy: Policy) -> Step:
    """Time passed."""
    if child.state is State.BACKOFF and now >= child.restart_at:
        return replace(child, state=State.STARTING, since=now, restarts=child.restarts + 1), (Effect.START,)
    if child.state is State.STOPPING and now - child.since >= policy.grace_s:
        return replace(child, since=now), (Effect.SWEEP,)
    return child, ()


def stop(child: Child, now: float, *, hard: bool = False) -> Step:
    """The operator wants it gone; `hard`: without waiting for what it is doing."""
    if child.settled:
        return child, ()
    if child.state is State.BACKOFF:
        return replace(child, state=State.STOPPED, since=now), ()
    if hard:
        return replace(child, state=State.STOPPING, since=now), (Effect.SWEEP,)
    if child.state is State.STOPPING:
        return child, ()
    return replace(child, state=State.STOPPING, since=now), (Effect.TERMINATE,)
