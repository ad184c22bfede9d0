"""What a row of the fault matrix is, and what comes of running it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ground:
    """Where a row runs. `folder` is its own and empty; `runs` and `seconds` replace the row's defaults if given."""

    folder: Path
    runs_wanted: int = 0
    seconds_wanted: float = 0.0

    def runs(self, default: int) -> int:
        """How often the fault is tried."""
        return self.runs_wanted or default

    def seconds(self, default: float) -> float:
        """How long a fault lasts, where the row's claim is about time."""
        return self.seconds_wanted or default


@dataclass(frozen=True, slots=True)
class Measured:
    """`ok`: as expected. `text` holds the numbers, whether or not they are."""

    ok: bool
    text: str


class Skipped(Exception):
    """This machine cannot run the row; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """`number` as in the matrix; `expected` is what `run` judges by; `limit_s`: a run that takes longer has failed."""

    number: int
    fault: str
    expected: str
    run: Callable[[Ground], Awaitable[Measured]]
    limit_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Result:
    """`verdict`: ok, FAILED or skipped."""

    row: Row
    verdict: str
    measured: str
    took_s: float
