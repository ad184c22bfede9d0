"""What to do after an attempt that failed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from infermesh.errors import TABLE, Reason

MAX_EXTRA_ATTEMPTS = 2  # in a row that brought nothing: so many instances at most can one request take down
MAX_ENGINE_FAILURES = 2  # of one request: what breaks two engines would break the next one, too
MAX_RESUMES = 3  # of one answer: even one that kills its instance after some tokens takes no fleet down
RETRY_SHARE = 0.2  # of live requests
MIN_RETRIES = 3  # concurrent, however little traffic there is
EARNED = 0.15  # of a retry, by each request: where all fails quickly, few run at once and yet many in a second
RESERVE, MOST_CREDIT = 10.0, 100.0  # retries
MIN_TIME_S = 0.005  # with less left before the deadline, another attempt only adds load

# The instance said no before it began: going elsewhere costs the fleet nothing, so it is not a retry.
FREE = frozenset({Reason.OUT_OF_RANGE, Reason.INSTANCE_FULL, Reason.DRAINING, Reason.STARTING})

# A broken connection takes its instance out of work in the same moment: what is tried again is bounded by what it had,
# and all of that asks at once. A share of live traffic would fail most of it; the bound on attempts still holds.
UNBUDGETED = FREE | {Reason.INSTANCE_LOST, Reason.STREAM_LOST}

# What ends a stream under way though another instance may go on. A drain that cannot wait hands its streams over.
BREAKS = FREE | {Reason.INSTANCE_LOST, Reason.STREAM_LOST, Reason.ENGINE_FAILED}


class Next(Enum):
    OTHER = "other"  # from the beginning
    RESUME = "resume"  # a replay of what was delivered, and on from there
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Progress:
    """`attempts`: failures in a row that may have begun work and brought nothing; `events`: what the caller already
    has; `resumable`: whether that can be continued elsewhere."""

    attempts: int
    events: int
    time_left_s: float
    engine_failures: int = 0
    resumes: int = 0
    resumable: bool = False


@dataclass(slots=True)
class Budget:
    """Retries under way, against requests under way; and retries made, against requests that came (`credit`: Finagle's
    budget, without its clock)."""

    live: int = 0
    retrying: int = 0
    credit: float = RESERVE

    def enter(self) -> None:
        self.live += 1
        self.credit = min(MOST_CREDIT, self.credit + EARNED)

    def spend(self) -> None:
        """A retry that counts is made."""
        self.credit -= 1

    def allows(self) -> bool:
        return self.credit >= 1 and self.retrying < max(MIN_RETRIES, RETRY_SHARE * self.live)


def next(reason: Reason, progress: Progress, budget: Budget) -> Next:
    """Elsewhere, as long as the fault is not the caller's, and time, attempts and budget are left; and once something
    was sent, only where another instance can go on exactly there."""
    if progress.time_left_s < MIN_TIME_S or progress.resumes >= MAX_RESUMES:
        return Next.STOP
    onward = Next.OTHER
    if progress.events:
        onward = Next.RESUME
        if not progress.resumable or reason not in BREAKS:
            return Next.STOP
    elif not TABLE[reason].elsewhere:
        return Next.STOP
    if reason in FREE:
        return onward
    if progress.attempts > MAX_EXTRA_ATTEMPTS or progress.engine_failures >= MAX_ENGINE_FAILURES:
        return Next.STOP
    return onward if reason in UNBUDGETED or budget.allows() else Next.STOP
