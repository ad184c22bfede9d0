"""Made-up traffic for a simulation: arrivals, lengths and repeated prefixes, from a line of `key=value` words. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import cos, exp, log, pi, sin
from typing import Protocol

from services.gateway.simulator.trace import BLOCK_TOKENS, Request, Trace, TraceError, chain_of

SHAPES = ("poisson", "constant", "bursts", "square", "sine", "day")
RUSH = (0.70, 0.72)  # of a day, in which twice as many come as would


class Source(Protocol):
    """The part of `random.Random` that is used."""

    def random(self) -> float: ...

    def gauss(self, mu: float, sigma: float) -> float: ...

    def expovariate(self, lambd: float) -> float: ...

    def randrange(self, stop: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Spec:
    """`rps`: mean requests a second. `shape`: poisson; constant; bursts of `burst` at once; square or sine
    between 1 - `swing` and 1 + `swing` times the mean over `period` seconds; a day that is quietest at its ends and
    has a rush in the evening. Lengths are lognormal with these
    means [tokens] and `spread` (σ of the logarithm). `prefixes` > 0: each prompt begins with one of so many
    prefixes of `prefix` tokens, the n-th taken in proportion to 1/n^`skew`. `degrade`: share of requests that a
    fallback model may serve."""

    requests: int = 1000
    rps: float = 1.0
    shape: str = "poisson"
    burst: int = 10
    swing: float = 0.9
    period: float = 60.0
    prompt: float = 2000.0
    output: float = 200.0
    spread: float = 0.8
    prefixes: int = 0
    prefix: int = 1024
    skew: float = 0.0
    degrade: float = 0.0
    kind: str = "llm"
    block: int = BLOCK_TOKENS


def parse_spec(text: str) -> Spec:
    """`rps=4,prompt=3000,shape=square`.

    Raises:
        TraceError: a key or value that is not allowed.
    """
    allowed = {item.name: item.type for item in fields(Spec)}
    values: dict[str, object] = {}
    for word in filter(None, text.replace(" ", ",").split(",")):
        key, _, value = word.partition("=")
        if key not in allowed:
            raise TraceError(f"--generate: {key!r} is not one of {', '.join(allowed)}")
        try:
            kind = allowed[key]
            values[key] = int(float(value)) if kind == "int" else float(value) if kind == "float" else value
        except ValueError:
            raise TraceError(f"--generate: {key}: {value!r} is not a number") from None
    spec = Spec(**values)  # type: ignore[arg-type]
    positive = ("requests", "rps", "burst", "period", "prompt", "output", "prefix", "block")
    for name in positive:
        if not 0 < getattr(spec, name) < 1e9:
            raise TraceError(f"--generate: {name} must be above 0")
    if spec.shape not in SHAPES:
        raise TraceError(f"--generate: shape {spec.shape!r} is not one of {', '.join(SHAPES)}")
    for name, high in (("swing", 1.0), ("spread", 3.0), ("prefixes", 1e7), ("skew", 5.0), ("degrade", 1.0)):
        if not 0 <= getattr(spec, name) <= high:
            raise TraceError(f"--generate: {name} must be within 0 .. {high:g}")
    if spec.kind not in ("llm", "embedding", "rerank"):
        raise TraceError(f"--generate: kind {spec.kind!r} is not one of llm, embedding, rerank")
    return spec


def generate(spec: Spec, source: Source) -> Trace:
    """The requests of a spec. Same spec and seed, same trace."""
    totals = _cumulated(spec)
    requests = []
    time, unnamed = 0.0, 1 << 40  # ids of blocks that nobody repeats
    for index in range(spec.requests):
        time = _next(spec, time, index, source)
        prompt = max(1, round(_length(spec.prompt, spec.spread, source)))
        output = max(1, round(_length(spec.output, spec.spread, source)))
        blocks: list[int] = []
        if totals:
            place = source.random() * totals[-1]
            chosen = next(number for number, total in enumerate(totals) if place < total)
            shared = spec.prefix // spec.block
            prompt = max(prompt, spec.prefix + 1)
            blocks = [(chosen << 20) + block for block in range(shared)]
        while len(blocks) * spec.block < prompt:
            blocks.append(unnamed)
            unnamed += 1
        may = spec.degrade > 0 and source.random() < spec.degrade
        chain = chain_of(blocks, "default")
        requests.append(Request(index, time, prompt, output, chain, kind=spec.kind, degrade=may))
    return Trace("generated", tuple(requests), spec.block)


def _cumulated(spec: Spec) -> list[float]:
    totals: list[float] = []
    for number in range(spec.prefixes):
        totals.append((totals[-1] if totals else 0.0) + 1 / (number + 1) ** spec.skew)
    return totals


def _length(mean: float, spread: float, source: Source) -> float:
    """Lognormal with this mean."""
    return exp(source.gauss(log(mean) - spread * spread / 2, spread)) if spread else mean


def _next(spec: Spec, time: float, index: int, source: Source) -> float:
    if spec.shape == "bursts":
        return time + (source.expovariate(spec.rps / spec.burst) if index % spec.burst == 0 else 0.0)
    if spec.shape == "constant":
        return time + (1 / spec.rps if index else 0.0)
    if spec.shape == "poisson":
        return time + source.expovariate(spec.rps)
    highest = (1 + spec.swing) * (2 if spec.shape == "day" else 1)
    while True:  # thinning of a Poisson process at the highest rate
        time += source.expovariate(spec.rps * highest)
        if source.random() * highest < _level(spec, (time / spec.period) % 1.0):
            return time


def _level(spec: Spec, phase: float) -> float:
    """The rate at this part of the period, as a multiple of the mean."""
    if spec.shape == "square":
        return 1 + spec.swing * (1.0 if phase < 0.5 else -1.0)
    if spec.shape == "sine":
        return 1 + spec.swing * sin(2 * pi * phase)
    return (1 - spec.swing * cos(2 * pi * phase)) * (2 if RUSH[0] <= phase < RUSH[1] else 1)
