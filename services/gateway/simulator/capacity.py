"""The highest rate that the best peer sustains, so that loads can be named as shares of it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MEAN_TTFT_S = 10.0  # sustained: the mean time to the first token stays below
PRECISION = 0.02  # relative width at which the search stops
MAX_STEPS = 40
SPAN = 2**12  # how far from the trace's own rate is looked


def capacity(mean_ttft: Callable[[str, float], float], policies: Sequence[str], start: float = 1.0) -> float:
    """The highest rate (of the trace's own) at which the best of `policies` keeps its mean TTFT below MEAN_TTFT_S.

    `mean_ttft(policy, rate)` simulates; where a policy has failed at a rate, it is not asked for higher ones.

    Raises:
        ValueError: no rate within SPAN of `start`, either way, separates the two.
    """

    failed: dict[str, float] = {}  # policy -> the lowest rate it was too slow at

    def sustained(rate: float) -> bool:
        for policy in policies:
            if rate < failed.get(policy, float("inf")):
                if mean_ttft(policy, rate) < MEAN_TTFT_S:
                    return True
                failed[policy] = rate
        return False

    low = high = start
    if sustained(start):
        while sustained(high := low * 2):
            low = high
            if high > start * SPAN:
                raise ValueError(
                    "every rate is sustained: the trace is too short for a queue to grow; take a longer one"
                )
    else:
        while not sustained(low := high / 2):
            high = low
            if low < start / SPAN:
                raise ValueError(f"no rate is sustained: the mean TTFT is over {MEAN_TTFT_S:g} s on an idle fleet")
    for _ in range(MAX_STEPS):
        if high / low <= 1 + PRECISION:
            break
        middle = (low * high) ** 0.5
        if sustained(middle):
            low = middle
        else:
            high = middle
    return low
