"""What to do after an attempt that failed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from infermesh.errors import TABLE, Reason

MAX_EXTRA_ATTEMPTS = 2
RETRY_SHARE = 0.2  # of live requests
MIN_RETRIES = 3  # concurrent, however little traffic there is
MIN_TIME_S = 0.005  # with less left before the deadline, another attempt only adds load

# The instance said no before it began: going elsewhere costs the fleet nothing, so it is not a retry.
FREE = frozenset({Reason.OUT_OF_RANGE, Reason.INSTANCE_FULL, Reason.DRAINING, Reason.STARTING})

# A broken connection takes its instance out of work in the same moment: what is tried again is bounded by what it had,
# and all of that asks at once. A share of live traffic would fail most of it; the bound on attempts still holds.
UNBUDGETED = FREE | {Reason.INSTANCE_LOST}


class Next(Enum):
    OTHER = "other"
    RESUME = "resume"  # a replay of the stream elsewhere; not produced yet
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Progress:
    """`attempts` counts those that may have begun work; `events` those the caller already has."""

    attempts: int
    events: int
    time_left_s: float


@dataclass(slots=True)
class Budget:
    """Retries under way, against requests under way."""

    live: int = 0
    retrying: int = 0

    def allows(self) -> bool:
        return self.retrying < max(MIN_RETRIES, RETRY_SHARE * self.live)


def next(reason: Reason, progress: Progress, budget: Budget) -> Next:
    """Elsewhere, as long as nothing was sent, the fault is not the caller's, and time, attempts and budget are left."""
    if progress.events or not TABLE[reason].elsewhere or progress.time_left_s < MIN_TIME_S:
        return Next.STOP
    if reason in FREE:
        return Next.OTHER
    if progress.attempts > MAX_EXTRA_ATTEMPTS:
        return Next.STOP
    return Next.OTHER if reason in UNBUDGETED or budget.allows() else Next.STOP
