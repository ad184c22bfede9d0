"""An instance's greedy answers beside a reference's: which token differs, and whether rounding explains it. Pure.

Rounding in 16 bits turns a close race between two tokens around; everything after such a turn differs, and says
nothing. So a difference is weighed by the reference's own gap between the two tokens, and the comparison goes on behind
the reference's token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

VERSION = 1


@dataclass(frozen=True, slots=True)
class Tolerance:
    """`agreement`: share of positions at which the top token must be the reference's, close races aside; `gap`: by how
    much [nats] the reference may prefer its token for that; `drift`: mean difference of log-probabilities [nats]."""

    agreement: float
    gap: float
    drift: float


# By what the instance computes in. Assumed from rounding: 24, 11 and 8 bits of mantissa; fewer for quantised weights.
TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(0.999, 0.01, 0.005),
    "float16": Tolerance(0.99, 0.1, 0.05),
    "bfloat16": Tolerance(0.98, 0.5, 0.15),
    "quantized": Tolerance(0.90, 1.5, 0.5),
}


@dataclass(frozen=True, slots=True)
class Position:
    """One token of a greedy answer. `top`: token -> log-probability of the likeliest few."""

    token: int
    logprob: float
    top: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """`at`: the position in the answer. `gap` [nats]: by how much the reference prefers its token; None: the other is
    not among its likeliest."""

    prompt: int
    at: int
    expected: int
    got: int
    gap: float | None

    def explained(self, tolerance: Tolerance) -> bool:
        return self.gap is not None and self.gap <= tolerance.gap


@dataclass(slots=True)
class Agreement:
    """Of all prompts together. `drifts`: |log-probability − reference's| of the tokens that agree."""

    positions: int = 0
    drifts: list[float] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    def add(self, prompt: int, at: int, expected: Sequence[Position], got: Sequence[Position]) -> int:
        """Compares from position `at` of the reference's answer. Returns where to go on: behind the first difference,
        or behind what was got."""
        for offset, (theirs, ours) in enumerate(zip(expected[at:], got, strict=False)):
            self.positions += 1
            if theirs.token != ours.token:
                other = theirs.top.get(ours.token)
                gap = None if other is None else max(0.0, theirs.logprob - other)
                self.differences.append(Difference(prompt, at + offset, theirs.token, ours.token, gap))
                return at + offset + 1
            self.drifts.append(abs(theirs.logprob - ours.logprob))
        return at + min(len(got), len(expected) - at)

    def unexplained(self, tolerance: Tolerance) -> list[Difference]:
        return [one for one in self.differences if not one.explained(tolerance)]

    def faults(self, tolerance: Tolerance) -> list[str]:
        """Why it is not the same model; nothing where it is."""
        if not self.positions:
            return ["no token was compared"]
        found = []
        share = 1 - len(self.unexplained(tolerance)) / self.positions
        if share < tolerance.agreement:
            found.append(f"top-1 agreement {share:.1%}, at least {tolerance.agreement:.1%} is wanted")
        if self.drifts and (drift := fmean(self.drifts)) > tolerance.drift:
            found.append(f"log-probabilities differ by {drift:.3f} nats in the mean, at most {tolerance.drift:g}")
        return found


def tolerance_of(dtype: str, quantization: str) -> tuple[str, Tolerance]:
    """(its name, the tolerance) of an instance; an unknown dtype is judged as bfloat16, the usual one."""
    name = "quantized" if quantization else dtype if dtype in TOLERANCES else "bfloat16"
    return name, TOLERANCES[name]
