"""One LLM instance, step by step, in closed form between the steps at which something changes.

The model is DESIGN §6's: a step gives every decoding request one token and computes up to `budget` tokens of prompts,
first come first served; it lasts `step_ms` + `kv_us_per_ktoken` for the resident tokens (when anybody decodes) plus
the time of its prompt tokens, which attention makes dearer with context. As long as nobody finishes or is let in, the
time of k steps is a·k + b·k², so that many steps cost one computation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, sqrt

from services.gateway.routing.facts import LoadReport
from services.gateway.simulator.blocks import BlockCache
from services.gateway.simulator.job import Job

BUDGET = 2048  # vLLM's max_num_batched_tokens unless told otherwise
_SLACK = 1e-9  # seconds by which a float may miss the end of a step


@dataclass(frozen=True, slots=True)
class Pace:
    """Speed in seconds and tokens. All are above 0 but `kv_s` [s a step for each resident token]."""

    prefill_tps: float
    doubling: float
    step_s: float
    kv_s: float

    def prefill_s(self, new: int, before: int) -> float:
        """Seconds for `new` prompt tokens after `before` that are there already."""
        return new / self.prefill_tps * (1 + (before + new / 2) / self.doubling)


@dataclass(slots=True)
class Segment:
    """`steps` equal steps from `start`, k of which last `a`·k + `b`·k² seconds. `chunk`: prompt tokens of `head` in
    each, where the segment has several; `parts` otherwise."""

    start: float
    steps: int
    a: float
    b: float
    decoding: int
    chunk: int = 0
    head: Job | None = None
    parts: tuple[tuple[Job, int], ...] = ()

    def seconds(self, steps: int) -> float:
        return self.a * steps + self.b * steps * steps

    @property
    def end(self) -> float:
        return self.start + self.seconds(self.steps)

    def steps_within(self, seconds: float) -> float:
        """The real number of steps that fit."""
        if self.b <= 0:
            return seconds / self.a if self.a > 0 else float(self.steps)
        return (sqrt(self.a * self.a + 4 * self.b * seconds) - self.a) / (2 * self.b)


def _ended(segment: Segment, now: float) -> int:
    """Those steps of the present segment that are over."""
    return min(int(segment.steps_within(now - segment.start) + _SLACK), segment.steps - 1)


class LlmEngine:
    """`context_max` 0 and `max_running` 0 bound nothing."""

    def __init__(
        self,
        id: str,
        pace: Pace,
        *,
        kv_tokens: int,
        block_tokens: int,
        max_running: int = 0,
        context_max: int = 0,
        budget: int = BUDGET,
    ) -> None:
        self.id = id
        self.pace = pace
        self.cache = BlockCache(kv_tokens // block_tokens)
        self.max_running = max_running or 1 << 30
        self.context_max = context_max
        self.busy_s = 0.0
        self.steps = 0
        self.changes = 0
        self._computed = 0  # prompt tokens, since it began, as of `_ended`
        self._ended = 0.0  # the last segment
        self.segment: Segment | None = None
        self._block = block_tokens
        self._budget = budget
        self._waiting: deque[Job] = deque()
        self._filling: deque[Job] = deque()  # let in, prompt not yet computed
        self._leaving: dict[Job, bool] = {}  # put aside at the end of the present step; True: and added again
        self._aside: set[Job] = set()  # put aside, to be added again
        self._finishing: list[tuple[int, int, Job]] = []  # decoding, by the tick of the last token
        self._ticks = 0
        self._order = 0
        self._resident = 0
        self._queued = 0  # prompt tokens to be computed, of those waiting and filling
        self._shares: dict[int, list[int]] = {}  # gateway -> [requests here, prompt tokens to be computed, highest seq]

    def refuses(self, job: Job) -> bool:
        """Whether it can never run here: over the range served, or more than the whole KV cache."""
        prompt = job.request.prompt
        over = bool(self.context_max) and prompt + 1 > self.context_max
        return over or self._blocks_of(prompt, 1) > self.cache.capacity

    def add(self, job: Job, now: float) -> bool:
        """It arrives; True when the end of the present segment is another than before."""
        self.changes += 1
        if job in self._leaving:
            self._leaving[job] = True
            return False
        blocked = bool(self._waiting)
        self._line_up(job)
        segment = self.segment
        if segment is None:
            self._plan(now)
            return self.segment is not None
        return not blocked and segment.head is None and self._cut(segment, now)

    def put_aside(self, job: Job, now: float) -> bool:
        """Its prompt leaves the engine, to be added again: what of it is computed stays cached. True as for `add`."""
        self.changes += 1
        if job in self._waiting:
            self._waiting.remove(job)
            self._aside.add(job)
            job.moved = True
            return False
        self._leaving[job] = False
        return self.segment is not None and self._cut(self.segment, now)

    def _line_up(self, job: Job) -> None:
        request = job.request
        room = self.cache.capacity * self._block
        if self.context_max:
            room = min(room, self.context_max)
        job.output = max(1, min(request.output, room - request.prompt))
        cached = self._cached(request.prompt, self.cache.match(request.chain))
        share = self._shares.setdefault(job.gateway, [0, 0, 0])
        if job in self._aside:
            self._aside.remove(job)
            self._queued -= job.left
            share[1] -= job.left
        else:
            job.cached = cached
            share[0] += 1
        job.left = request.prompt - cached
        self._queued += job.left
        share[1] += job.left
        if job.lease is not None and job.lease.seq > share[2]:
            share[2] = job.lease.seq
        self._waiting.append(job)

    def _leave(self) -> None:
        """At the end of a step. Whose prompt ends with it stays."""
        for job in [job for job in self._leaving if job in self._filling]:
            request = job.request
            self._filling.remove(job)
            self._resident -= job.computed
            blocks = self._blocks_of(request.prompt, job.output)
            self.cache.give_back(request.chain, blocks, job.computed // self._block)
            self._aside.add(job)
            job.moved = True
            if self._leaving[job]:
                self._line_up(job)
        self._leaving.clear()

    def _cut(self, segment: Segment, now: float) -> bool:
        """The segment ends with its present step. True where that changes its end."""
        if segment.steps == 1:
            return False
        steps = max(1, ceil(segment.steps_within(now - segment.start) - _SLACK))
        if steps >= segment.steps:
            return False
        segment.steps = steps
        return True

    def advance(self) -> tuple[list[Job], list[Job]]:
        """The present segment is over: who got the first token at its end, and who the last."""
        segment = self.segment
        assert segment is not None
        now = segment.end
        self.changes += 1
        self.busy_s += now - segment.start
        self._ended = now
        self.steps += segment.steps
        if segment.decoding:
            self._ticks += segment.steps
            self._resident += segment.steps * segment.decoding
        if segment.head is not None:
            self._compute(segment.head, segment.chunk * segment.steps)
        for job, new in segment.parts:
            self._compute(job, new)
        started: list[Job] = []
        done: list[Job] = []
        while self._finishing and self._finishing[0][0] <= self._ticks:
            done.append(heappop(self._finishing)[2])
        while self._filling and not self._filling[0].left:
            job = self._filling.popleft()
            self._resident += 1
            started.append(job)
            if job.output == 1:
                done.append(job)
            else:
                self._order += 1
                job.finish_tick = self._ticks + job.output - 1
                heappush(self._finishing, (job.finish_tick, self._order, job))
        for job in done:
            self._resident -= job.request.prompt + job.output
            self.cache.give_back(job.request.chain, self._blocks_of(job.request.prompt, job.output))
            self._shares[job.gateway][0] -= 1
        if self._leaving:
            self._leave()
        self._plan(now)
        return started, done

    def computed(self, now: float) -> tuple[int, float]:
        """Prompt tokens computed since it began, and when the last step that has ended did."""
        segment = self.segment
        steps = _ended(segment, now) if segment is not None else 0
        if segment is None or not steps:
            return self._computed, self._ended
        return self._computed + steps * segment.chunk, segment.start + segment.seconds(steps)

    def load(self, gateway: int, now: float) -> LoadReport:
        """What it would say of itself to this gateway, at a moment of the present segment."""
        segment = self.segment
        resident, queued, steps = self._resident, self._queued, 0
        share = self._shares.get(gateway, (0, 0, 0))
        own = share[1]
        if segment is not None:
            steps = _ended(segment, now)
            progress = steps * segment.chunk
            resident += steps * segment.decoding + progress
            queued -= progress
            if segment.head is not None and segment.head.gateway == gateway:
                own -= progress
        return LoadReport(
            running=len(self._filling) + len(self._finishing),
            waiting=len(self._waiting),
            queued_tokens=queued,
            kv_used_ratio=self.cache.in_use / self.cache.capacity,
            resident_tokens=resident,
            steps=self.steps + steps,
            seen_seq=share[2],
            own_running=share[0],
            own_queued_tokens=own,
        )

    @property
    def running(self) -> int:
        return len(self._filling) + len(self._finishing)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _blocks_of(self, prompt: int, output: int) -> int:
        return -(-(prompt + output) // self._block)

    def _cached(self, prompt: int, blocks: int) -> int:
        return min(blocks * self._block, prompt - 1)  # one token at least is computed, to have something to sample from

    def _compute(self, job: Job, new: int) -> None:
        job.computed += new
        job.left -= new
        self._computed += new
        self._resident += new
        self._queued -= new
        self._shares[job.gateway][1] -= new

    def _admit(self) -> Job | None:
        """The first of those waiting, if there is room for it."""
        if not self._waiting or self.running >= self.max_running:
            return None
        job = self._waiting[0]
        request = job.request
        matched = self.cache.take(request.chain, self._blocks_of(request.prompt, job.output))
        if matched is None:
            return None
        self._waiting.popleft()
        job.computed = self._cached(request.prompt, matched)
        if not job.moved:
            job.cached = job.computed
        left = request.prompt - job.computed
        self._queued += left - job.left
        self._shares[job.gateway][1] += left - job.left
        job.left = left
        self._resident += job.computed
        self._filling.append(job)
        return job

    def _plan(self, now: float) -> None:
        """What the next step computes, and for how many steps that stays so."""
        decoding = len(self._finishing)
        budget = max(1, self._budget - decoding)
        until = self._finishing[0][0] - self._ticks if decoding else 0
        resident, pace = self._resident, self.pace
        head = self._filling[0] if self._filling else None  # at most one prompt is ever half computed
        if head is not None and head.left > budget:
            steps = head.left // budget
            if decoding:
                steps = min(steps, until)
            per_step = budget / pace.prefill_tps
            a = per_step * (1 + head.computed / pace.doubling)
            b = per_step * budget / (2 * pace.doubling)
            if decoding:
                grow = pace.kv_s * (decoding + budget) / 2
                a += pace.step_s + pace.kv_s * resident - grow
                b += grow
            self.segment = Segment(now, steps, a, b, decoding, budget, head)
            return
        parts: list[tuple[Job, int]] = []
        seconds = 0.0
        job = head if head is not None else self._admit()
        while job is not None:
            new = min(job.left, budget)
            parts.append((job, new))
            seconds += pace.prefill_s(new, job.computed)
            budget -= new
            job = self._admit() if budget else None
        if parts:
            if len(parts) == 1 and parts[0][1] < parts[0][0].left:
                self._plan(now)  # one prompt fills the budget, for several steps perhaps
                return
            if decoding:
                seconds += pace.step_s + pace.kv_s * self._resident
            self.segment = Segment(now, 1, seconds, 0.0, decoding, 0, None, tuple(parts))
        elif decoding:
            grow = pace.kv_s * decoding / 2
            self.segment = Segment(now, until, pace.step_s + pace.kv_s * resident - grow, grow, decoding)
        else:
            self.segment = None
