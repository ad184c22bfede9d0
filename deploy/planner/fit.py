"""From measured times to the speed of DESIGN §6: least squares with no coefficient below 0. Pure.

Errors are relative: a prompt of 256 tokens counts as much as one of 32,768. With at most three columns the bounded
problem is solved exactly: the best of all subsets whose free solution is not negative (Lawson and Hanson, Solving Least
Squares Problems, 1974, chapter 23, states the conditions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

NO_DOUBLING = 1e7  # tokens: attention was not seen to cost anything
MOST_ERROR = 0.3  # median relative error of the points beyond which a fit is refused
SPREAD = 1.5  # the largest point must cost so much more than the smallest, or nothing has been measured


class NoFit(ValueError):
    """What was measured does not have the shape of the model; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt alone: `new` tokens computed behind `cached` ones, `seconds` to the first token."""

    new: float
    cached: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Decode:
    """`seconds` a step of `streams` requests that hold `resident` tokens of KV together."""

    streams: int
    resident: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Batch:
    """One embedding or rerank request of `tokens` in all."""

    tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """`values`: under the names of `registry.endpoint.Speed`. `error`: name of a curve -> median relative error of its
    points, `worst` the largest."""

    values: dict[str, float]
    error: dict[str, float]
    worst: dict[str, float]


def prefill_s(values: dict[str, float], new: float, cached: float = 0.0) -> float:
    """Seconds to the first token of a prompt alone, as the fitted numbers say."""
    attention = 1 + (cached + new / 2) / values["prefill_doubling_ctx"]
    return values.get("fixed_ms", 0.0) / 1000 + new / values["prefill_tps"] * attention


def step_s(values: dict[str, float], resident: float) -> float:
    return values["step_ms"] / 1000 + values["kv_us_per_ktoken"] * resident / 1e9


def batch_s(values: dict[str, float], tokens: float) -> float:
    return values["fixed_ms"] / 1000 + tokens / values["tokens_per_s"]


def fit_llm(prefills: Sequence[Prefill], decodes: Sequence[Decode]) -> Fit:
    """`fixed_ms` (what every request takes beside its prefill), `prefill_tps`, `prefill_doubling_ctx`, `step_ms` and
    `kv_us_per_ktoken`.

    Raises:
        NoFit: too few points, times that do not grow with the prompt, or points that the model does not meet.
    """
    if len({round(point.new) for point in prefills}) < 3:
        raise NoFit(f"prefill: {len(prefills)} points; three prompt lengths are needed (a wider context range)")
    if not decodes:
        raise NoFit("decode: no point")
    _grows([(point.new, point.seconds) for point in prefills], "prefill: the first token", "a prompt of", "tokens")
    fixed, linear, square = bounded(
        [(1.0, point.new, point.new * (point.cached + point.new / 2)) for point in prefills],
        [point.seconds for point in prefills],
    )
    if linear <= 0:
        raise NoFit("prefill: the time grows with the square of the prompt alone; the measurement was disturbed")
    doubling = min(NO_DOUBLING, linear / square) if square > 0 else NO_DOUBLING
    step, resident = bounded([(1.0, point.resident) for point in decodes], [point.seconds for point in decodes])
    if step <= 0:
        raise NoFit("decode: a step takes no time without resident tokens; the measurement was disturbed")
    values = {
        "prefill_tps": 1 / linear,
        "prefill_doubling_ctx": doubling,
        "step_ms": 1000 * step,
        "kv_us_per_ktoken": 1e9 * resident,
        "fixed_ms": 1000 * fixed,
    }
    return _checked(
        values,
        {
            "prefill": [(prefill_s(values, point.new, point.cached), point.seconds) for point in prefills],
            "decode": [(step_s(values, point.resident), point.seconds) for point in decodes],
        },
    )


def fit_encoder(points: Sequence[Batch]) -> Fit:
    """`fixed_ms` and `tokens_per_s`.

    Raises:
        NoFit: as `fit_llm`.
    """
    if len({round(point.tokens) for point in points}) < 3:
        raise NoFit(f"{len(points)} points; three sizes of a batch are needed")
    _grows([(point.tokens, point.seconds) for point in points], "the answer", "a batch of", "tokens")
    fixed, linear = bounded([(1.0, point.tokens) for point in points], [point.seconds for point in points])
    if linear <= 0:
        raise NoFit("the time does not grow with the tokens; the measurement was disturbed")
    values = {"fixed_ms": 1000 * fixed, "tokens_per_s": 1 / linear}
    return _checked(values, {"batch": [(batch_s(values, point.tokens), point.seconds) for point in points]})


def bounded(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients >= 0 that make the sum of squared relative errors smallest."""
    width = len(rows[0])
    scale = [max(abs(row[column]) for row in rows) or 1.0 for column in range(width)]
    scaled = [
        [row[column] / scale[column] / took for column in range(width)] for row, took in zip(rows, seconds, strict=True)
    ]
    best: list[float] = [0.0] * width
    least = float(len(rows))  # nothing at all: every relative error is 1
    for size in range(1, width + 1):
        for chosen in combinations(range(width), size):
            found = _free(scaled, chosen)
            if found is None or min(found) < 0:
                continue
            whole = [0.0] * width
            for column, value in zip(chosen, found, strict=True):
                whole[column] = value
            left = sum((sum(v * r for v, r in zip(whole, row, strict=True)) - 1) ** 2 for row in scaled)
            if left < least:
                best, least = whole, left
    return [value / by for value, by in zip(best, scale, strict=True)]


def _free(rows: Sequence[Sequence[float]], chosen: Sequence[int]) -> list[float] | None:
    """The normal equations of these columns for a right side of ones, by elimination; None where they are singular."""
    size = len(chosen)
    matrix = [[sum(row[a] * row[b] for row in rows) for b in chosen] + [sum(row[a] for row in rows)] for a in chosen]
    largest = max(abs(matrix[place][place]) for place in range(size))
    for place in range(size):
        pivot = max(range(place, size), key=lambda line: abs(matrix[line][place]))
        matrix[place], matrix[pivot] = matrix[pivot], matrix[place]
        if abs(matrix[place][place]) < 1e-12 * largest:
            return None
        for line in range(size):
            if line != place:
                factor = matrix[line][place] / matrix[place][place]
                matrix[line] = [a - factor * b for a, b in zip(matrix[line], matrix[place], strict=True)]
    return [matrix[place][size] / matrix[place][place] for place in range(size)]


def _grows(points: Sequence[tuple[float, float]], what: str, size: str, unit: str) -> None:
    ordered = sorted(points)
    (small, short), (large, long) = ordered[0], ordered[-1]
    if min(seconds for _, seconds in points) <= 0:
        raise NoFit(f"{what} came in no time; the clock or the instance is wrong")
    if long < SPREAD * short:
        raise NoFit(
            f"{what} of {size} {large:.0f} {unit} took {long:.4g} s and of {small:.0f} {short:.4g} s: the length makes "
            "no difference, so it is not the instance's speed that was measured (a loaded host, a network, or a "
            "server behind it that caches)"
        )


def _checked(values: dict[str, float], curves: dict[str, list[tuple[float, float]]]) -> Fit:
    def off(pairs: list[tuple[float, float]], of: Callable[[list[float]], float]) -> float:
        return of([abs(thought / seen - 1) for thought, seen in pairs])

    error = {name: off(pairs, median) for name, pairs in curves.items()}
    worst = {name: off(pairs, max) for name, pairs in curves.items()}
    for name, size in error.items():
        if size > MOST_ERROR:
            raise NoFit(
                f"{name}: half of the points are off by more than {size:.0%}, at most {MOST_ERROR:.0%} is taken; the "
                "instance or its host was busy with something else: try again, or let it run longer (without --quick)"
            )
    return Fit(values, error, worst)
