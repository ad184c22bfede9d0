"""Room that a long-context instance keeps for long prompts, from those that were seen. Slow means, decayed by time."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

MEMORY_S = 120.0  # what is older than this counts for little
HELD_AT_MOST = 0.5  # of the KV cache


@dataclass(slots=True)
class Reserve:
    """Long prompts dispatched here: decayed sums of `work` [s of prefill] and `held` [KV tokens x s], as of `at`."""

    work: float = 0.0
    held: float = 0.0
    at: float = 0.0

    def observe(self, work: float, tokens: int, duration: float, now: float) -> None:
        self._decay(now)
        self.work += work
        self.held += tokens * duration

    def load(self, now: float) -> float:
        """The part of the instance's time that long prompts take."""
        self._decay(now)
        return min(1.0, self.work / MEMORY_S)

    def kv_tokens(self, now: float, capacity: int) -> int:
        """KV room that they hold on average."""
        self._decay(now)
        return round(min(self.held / MEMORY_S, HELD_AT_MOST * capacity))

    def _decay(self, now: float) -> None:
        if now > self.at:
            factor = exp((self.at - now) / MEMORY_S)
            self.work *= factor
            self.held *= factor
            self.at = now
