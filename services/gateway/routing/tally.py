"""How the calls of one instance ended lately. Only its own failures are counted here, never the caller's errors."""

from __future__ import annotations

from dataclasses import dataclass, field

SECONDS = 10
IN_A_ROW = 3
RATE = 0.25  # so that 30 % is seen within the window, whatever chance does
VOLUME = 20  # calls in the window, for a rate to say anything
WORSE = 2.0  # than the others of the pool: what all suffer from is not this one's fault


@dataclass(slots=True)
class Tally:
    """A wave is what one fault brought down: calls that ran when the last failure was counted belong to that one.
    `in_a_row`: waves since the last success."""

    in_a_row: int = 0
    counted_at: float = float("-inf")
    good: list[int] = field(default_factory=lambda: [0] * SECONDS)
    bad: list[int] = field(default_factory=lambda: [0] * SECONDS)
    waves: list[int] = field(default_factory=lambda: [0] * SECONDS)
    second: int = 0

    def succeeded(self, now: float) -> None:
        self.in_a_row = 0
        self.good[self._slot(now)] += 1

    def failed(self, sent_at: float, now: float) -> None:
        """A call that was sent at `sent_at`."""
        slot = self._slot(now)
        self.bad[slot] += 1
        if sent_at >= self.counted_at:
            self.counted_at = now
            self.in_a_row += 1
            self.waves[slot] += 1

    def window(self, now: float) -> tuple[int, int]:
        """(failed, all) of the last seconds."""
        self._slot(now)
        failed = sum(self.bad)
        return failed, failed + sum(self.good)

    def too_many(self, now: float, others: tuple[int, int]) -> str:
        """Why it should be taken out, or nothing. `others`: the window of the rest of its pool."""
        if self.in_a_row >= IN_A_ROW:
            return f"{self.in_a_row} failures in a row"
        failed, total = self.window(now)
        if total < VOLUME or failed < RATE * total or sum(self.waves) < IN_A_ROW:
            return ""
        if failed / total < WORSE * others[0] / max(1, others[1]):
            return ""
        return f"{failed} of {total} calls failed within {SECONDS} s"

    def _slot(self, now: float) -> int:
        second = int(now)
        for gone in range(max(self.second + 1, second - SECONDS + 1), second + 1):
            slot = gone % SECONDS
            self.good[slot] = self.bad[slot] = self.waves[slot] = 0
        self.second = max(self.second, second)
        return second % SECONDS
