"""An instance that does its work, only far slower than it should: its share of new work falls, quickly.

`rates.py` learns an instance's speed slowly and within bounds, from requests that had it to themselves. This looks at
all streams, every second: how many tokens they should have made by prediction, over how many they made. What the others
of the pool suffer as well (a shared network, a busy gateway, a prior that is wrong for all) is taken out, so that only
what sets an instance apart counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

EVERY_S = 1.0  # awake
LEARN = 0.3  # of the newest second
FADE_S = 120.0  # without evidence, what was seen is half forgotten after 83 s: somebody has to try it again
ODD = 2.0  # below that, it is noise
LEAST = 0.03  # of its share
MOST = 30.0


@dataclass(slots=True)
class Pace:
    """`lag`: log of predicted over made tokens. `told`: whether there is any evidence."""

    lag: float = 0.0
    told: bool = False
    share: float = 1.0  # of its weight
    at: float = 0.0
    tokens: int = 0
    streams: int = 0

    def note(self, awake: float, tokens: int, streams: int, step_s: float) -> None:
        """`tokens`: made so far in all; `streams`: waited for now; `step_s`: of one token, as predicted."""
        passed, made = awake - self.at, tokens - self.tokens
        flowing = min(streams, self.streams)
        self.at, self.tokens, self.streams = awake, tokens, streams
        if flowing and step_s > 0:
            ratio = min(MOST, max(1 / MOST, flowing * passed / step_s / max(1, made)))
            self.lag += LEARN * (log(ratio) - self.lag)
            self.told = True
        else:
            self.lag *= exp(-passed / FADE_S)

    def judge(self, usual: float) -> None:
        """Sets its share to one over how many times slower than the pool's middle it is."""
        slower = exp(self.lag - max(0.0, usual)) if self.told else 1.0
        self.share = 1.0 if slower < ODD else max(LEAST, 1 / slower)


def usual(pool: Sequence[Pace]) -> float:
    """The lag of the middle one, of two the smaller."""
    known = sorted(pace.lag for pace in pool if pace.told)
    return known[(len(known) - 1) // 2] if known else 0.0
