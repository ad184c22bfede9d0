"""An instance measures itself: what to ask in which order, that nobody else is there, and the fit of it all."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from random import Random
from statistics import median
from typing import Any, TypeVar

import grpc.aio

from deploy.planner.fit import Batch, Decode, Fit, NoFit, Prefill, batch_s, fit_encoder, fit_llm, prefill_s, step_s
from infermesh.errors import MeshError, Reason
from infermesh.transport import channel_options
from registry.endpoint import Capacity, Endpoint
from services.chassis.arrivals import Arrivals
from services.chassis.probes import EncoderProbes, LlmProbes

LENGTHS = (256, 1024, 8192, 32_768)  # tokens of the prompts, and the longest served
LONGEST_SHARE = 0.92  # of the context range: word lengths vary, and there is an answer
WARM_UP_TOKENS = 8192  # longer prompts are computed in chunks of no more: the kernels are the same
SLOW_S = 20.0  # a probe that takes longer is not repeated
ROUNDS, QUICK_ROUNDS = 5, 2
RESIDENT_SHARE = 0.6  # of the KV cache, at most, while decoding is measured
MOST_RESIDENT = 65_536  # tokens
IDLE_S = 2.0  # for the last answer to leave
TRIES = 3  # of a probe that somebody else's request fell into
ROWS = ((1, 8), (1, 64), (4, 64), (16, 64), (64, 64))  # texts of a batch, tokens of each
QUICK_ROWS = ROWS[:-1]
HELD_OUT_ROWS = ((2, 64), (8, 64), (32, 64))
Point = TypeVar("Point", Prefill, Decode, Batch)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A point that the fit has not seen. Seconds."""

    what: str
    predicted: float
    seen: float

    @property
    def error(self) -> float:
        return abs(self.predicted / self.seen - 1)


@dataclass(frozen=True, slots=True)
class Found:
    """The result. `points`: what was measured, medians."""

    fit: Fit
    points: Sequence[Prefill | Decode | Batch]
    held_out: Sequence[HeldOut]

    def report(self) -> dict[str, Any]:
        return {
            "error": self.fit.error,
            "worst": self.fit.worst,
            "points": [{"kind": type(point).__name__.lower(), **asdict(point)} for point in self.points],
            "held_out": [{**asdict(one), "error": one.error} for one in self.held_out],
        }


@dataclass(frozen=True, slots=True)
class Step:
    """`progress` 0 .. 1; the last one has `found`."""

    progress: float
    text: str
    found: Found | None = None


def lengths(capacity: Capacity, *, quick: bool) -> list[int]:
    """Prompt lengths [tokens] to measure: the usual ones within the range, and the longest served. Where that leaves
    fewer than four, halves of the longest fill them up.

    Raises:
        NoFit: the range is too narrow for three different lengths.
    """
    longest = int(LONGEST_SHARE * min(filter(None, (capacity.context_max, capacity.kv_tokens)), default=LENGTHS[-1]))
    lowest = max(64, int(capacity.context_min * 1.1))
    found = {length for length in LENGTHS if lowest <= length < 0.8 * longest} | {longest}
    half = longest // 2
    while len(found) < 4 and half >= lowest:
        found.add(half)
        half //= 2
    if len(found) < 3 or longest <= lowest:
        raise NoFit(f"prompts of {lowest} .. {longest} tokens are served here: too narrow a range to measure")
    chosen = sorted(found)
    short = [length for length in chosen if length <= WARM_UP_TOKENS]
    return short if quick and len(short) >= 3 else chosen


def decodings(capacity: Capacity, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(answers at once, tokens of their prompts): from nearly nothing resident to much."""
    room = min(MOST_RESIDENT, int(RESIDENT_SHARE * capacity.kv_tokens) or MOST_RESIDENT)
    long = min(sizes[-1] // 2, room)
    found = [(1, sizes[0]), (1, max(sizes[0], long))]
    for streams in (4, 8):
        each = min(long, room // streams)
        if each >= sizes[0] and streams <= (capacity.max_running or 256):
            found.append((streams, each))
    return list(dict.fromkeys(found))


@dataclass(slots=True)
class Calibrator:
    """`address`: where this very instance listens. One calibration at a time."""

    endpoint: Callable[[], Endpoint]
    arrivals: Arrivals
    address: Callable[[], str]
    random: Random = field(default_factory=Random)
    _busy: bool = False

    async def run(self, quick: bool, authorization: str) -> AsyncGenerator[Step, None]:
        """`authorization`: that of the caller, with which the probes are asked.

        Raises:
            MeshError: FAILED_PRECONDITION, others use the instance, or no speed can be made of what was measured.
        """
        if self._busy:
            raise _refused("a calibration of this instance is under way; wait for its end")
        self._busy = True
        metadata = (("authorization", authorization),) if authorization else ()
        endpoint = self.endpoint()
        try:
            async with grpc.aio.insecure_channel(self.address(), channel_options()) as channel:
                if endpoint.kind == "llm":
                    llm = LlmProbes(channel, endpoint.model, metadata, self.random)
                    steps = self._llm(llm, endpoint.capacity, quick=quick)
                else:
                    encoder = EncoderProbes(endpoint.kind, channel, endpoint.model, metadata, self.random)
                    steps = self._encoder(encoder, endpoint.capacity, quick=quick)
                async for step in steps:
                    yield step
        except NoFit as error:
            raise _refused(str(error)) from None
        finally:
            self._busy = False

    async def _llm(self, probes: LlmProbes, capacity: Capacity, *, quick: bool) -> AsyncGenerator[Step, None]:
        sizes = lengths(capacity, quick=quick)
        rounds = QUICK_ROUNDS if quick else ROUNDS
        decoded = decodings(capacity, sizes)
        between = round((sizes[-2] * sizes[-1]) ** 0.5)
        half_full = (2, max(sizes[0], decoded[-1][1] // 2))
        warm = [size for size in sizes if size <= WARM_UP_TOKENS] or sizes[:1]
        count = _Count(len(warm) + rounds * (len(sizes) + len(decoded)) + 2 * rounds)
        await probes.learn()
        for size in warm:
            yield count.step(f"warming up, {size} tokens")
            await self._probe(1, partial(probes.prefill, size))
        prefills: dict[int, list[Prefill]] = {size: [] for size in sizes}
        steps: dict[tuple[int, int], list[Decode]] = {which: [] for which in decoded}
        for turn in range(rounds):  # in turn, so that what else the host does meets all of them
            for size in sizes:
                yield count.step(f"prefill {size} tokens, {turn + 1} of {rounds}")
                if not prefills[size] or prefills[size][0].seconds < SLOW_S:
                    prefills[size].append(await self._probe(1, partial(probes.prefill, size)))
            for streams, size in decoded:
                yield count.step(f"decode {streams} × {size} tokens, {turn + 1} of {rounds}")
                seen = await self._probe(streams, partial(probes.decode, streams, size))
                if seen is not None:
                    steps[streams, size].append(seen)
        first: list[Prefill] = []
        pace: list[Decode] = []
        for _ in range(rounds):
            yield count.step(f"held out: prefill {between} tokens, decode {half_full[0]} × {half_full[1]}")
            first.append(await self._probe(1, partial(probes.prefill, between)))
            if (seen := await self._probe(half_full[0], partial(probes.decode, *half_full))) is not None:
                pace.append(seen)
            count.step("")
        new, resident = [_middle(points) for points in prefills.values()], [_middle(p) for p in steps.values() if p]
        fit = fit_llm(new, resident)
        held = [_held_prefill(fit, _middle(first)), *([_held_decode(fit, _middle(pace))] if pace else [])]
        yield Step(1.0, "fitted", Found(fit, [*new, *resident], held))

    async def _encoder(self, probes: EncoderProbes, capacity: Capacity, *, quick: bool) -> AsyncGenerator[Step, None]:
        rows = QUICK_ROWS if quick else ROWS
        rounds = ROUNDS if quick else 2 * ROUNDS + 1  # they are short
        top = int(LONGEST_SHARE * capacity.context_max) or 64
        count = _Count(len(rows) + rounds * (len(rows) + len(HELD_OUT_ROWS)))
        for each, tokens in rows:
            yield count.step(f"warming up, {each} × {min(tokens, top)} tokens")
            await self._probe(1, partial(probes.batch, each, min(tokens, top)))
        seen: dict[tuple[int, int], list[Batch]] = {which: [] for which in (*rows, *HELD_OUT_ROWS)}
        for turn in range(rounds):
            for each, tokens in seen:
                yield count.step(f"{each} × {min(tokens, top)} tokens, {turn + 1} of {rounds}")
                batch = await self._probe(1, partial(probes.batch, each, min(tokens, top)))
                seen[each, tokens].append(batch)
        points = [_middle(seen[which]) for which in rows]
        fit = fit_encoder(points)
        held = [_middle(seen[which]) for which in HELD_OUT_ROWS]
        found = [
            HeldOut(f"batch of {one.tokens:g} tokens", batch_s(fit.values, one.tokens), one.seconds) for one in held
        ]
        yield Step(1.0, "fitted", Found(fit, points, found))

    async def _probe(self, requests: int, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What `ask` measures with so many requests, once nobody else was there meanwhile."""
        for _ in range(TRIES):
            if not await self.arrivals.wait_idle(IDLE_S):
                raise _refused(f"{self.arrivals.running} requests of others run here; {self._way_out()}")
            before = self.arrivals.entered
            try:
                found = await ask()
            except grpc.aio.AioRpcError as error:
                raise _refused(f"a probe was refused: {error.details()}") from None
            if self.arrivals.entered - before == requests:
                return found
        raise _refused(f"requests of others came into {TRIES} measurements in a row; {self._way_out()}")

    def _way_out(self) -> str:
        return f"keep them away meanwhile: infermesh ban {self.endpoint().id} --for 10m --why calibrating"


@dataclass(slots=True)
class _Count:
    total: int
    done: int = 0

    def step(self, text: str) -> Step:
        at, self.done = self.done / self.total, self.done + 1
        return Step(min(at, 0.99), text)


def _middle(points: Sequence[Point]) -> Point:
    """Medians, number by number."""
    names: Iterator[str] = iter(type(points[0]).__dataclass_fields__)
    return type(points[0])(**{name: median(getattr(point, name) for point in points) for name in names})


def _held_prefill(fit: Fit, seen: Prefill) -> HeldOut:
    return HeldOut(f"TTFT of {seen.new:g} tokens", prefill_s(fit.values, seen.new, seen.cached), seen.seconds)


def _held_decode(fit: Fit, seen: Decode) -> HeldOut:
    what = f"TPOT of {seen.streams} streams, {seen.resident:g} resident tokens"
    return HeldOut(what, step_s(fit.values, seen.resident), seen.seconds)


def _refused(why: str) -> MeshError:
    return MeshError(Reason.FAILED_PRECONDITION, f"not calibrated: {why}")
