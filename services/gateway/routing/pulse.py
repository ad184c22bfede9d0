"""Signs of life of running work, and the clock that silence is measured on.

Silence counts only while our own loop was awake: a gateway that stood still for five seconds has heard nothing for five
seconds, and nobody is to blame for it. So what is compared is not the time but the sum of the ticks, in which a tick
that came late counts no more than `LATE_S`. Events read that sum and need no clock of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LATE_S = 0.1  # twice the tick: what is beyond it was our own delay
P99_UP, P99_DOWN = 1.05, 0.99952  # log steps 99 : 1
SHORTEST_GAP_S, LONGEST_GAP_S = 0.001, 6.0


@dataclass(slots=True)
class Awake:
    """`now`: seconds that this loop was awake."""

    now: float = 0.0
    ticked: float | None = None

    def tick(self, now: float) -> None:
        """`now`: the clock's time."""
        if self.ticked is not None:
            self.now += min(max(0.0, now - self.ticked), LATE_S)
        self.ticked = now


@dataclass(slots=True)
class Vital:
    """All streams of one life together. `at`: when, awake, the last of them moved. `gap_s`: the 99th percentile of the
    time between two tokens of a stream, to the tick (frugal streaming: Ma, Muthukrishnan, Sandler 2013)."""

    at: float = 0.0
    tokens: int = 0
    gap_s: float = SHORTEST_GAP_S


@dataclass(slots=True)
class Pulse:
    """One attempt. `at`: when, awake, it began or moved last. `heeded`: somebody waits for its next event; a caller who
    reads slowly is no silence of the instance, and where nobody tells, nothing is watched."""

    at: float = 0.0
    tokens: int = 0
    heeded: bool = False
    vital: Vital = field(default_factory=Vital)

    def heed(self, awake: float) -> None:
        """The next event is read now."""
        self.heeded = True
        self.at = awake

    def beat(self, tokens: int, awake: float) -> None:
        """An event came that carries so many tokens."""
        self.heeded = False
        vital = self.vital
        vital.tokens += tokens
        gap = awake - self.at
        if gap:
            self.at = awake
        vital.at = awake
        if not self.tokens:  # the first ones tell of the prompt
            self.tokens = tokens
            return
        self.tokens += tokens
        if tokens > 1:
            gap /= tokens
        if gap > vital.gap_s:
            vital.gap_s = min(vital.gap_s * P99_UP, LONGEST_GAP_S)
        elif vital.gap_s > SHORTEST_GAP_S:
            vital.gap_s *= P99_DOWN
