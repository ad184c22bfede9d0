"""Continuous batching as DESIGN §6 models it: what a step of the scripted engine computes, and how long it takes. Pure.

A step has room for `chunk` tokens: one for every request that has its prompt computed, the others for the prompts of
those that have not, first those let in before, then those who wait. Blocks are reserved for the whole answer, so that
nothing is ever preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from services.llm.engines.scripted_cache import BLOCK, Blocks, Lease, extend_chain


@dataclass(frozen=True, slots=True)
class Pace:
    """The four numbers of `registry.endpoint.Speed`; 0 takes no time."""

    prefill_tps: float = 0.0
    prefill_doubling_ctx: float = 0.0
    step_ms: float = 0.0
    kv_us_per_ktoken: float = 0.0

    def prefill_s(self, new: int, before: int) -> float:
        """Seconds for `new` prompt tokens after `before` that are there already."""
        if not self.prefill_tps:
            return 0.0
        attention = (before + new / 2) / self.prefill_doubling_ctx if self.prefill_doubling_ctx else 0.0
        return new / self.prefill_tps * (1 + attention)

    def decode_s(self, resident_tokens: int) -> float:
        return self.step_ms / 1e3 + self.kv_us_per_ktoken * resident_tokens / 1e9


@dataclass(slots=True, eq=False)
class Job:
    """One request. `tokens` is the prompt, and grows with the answer; `target` is what is to be made, a choice."""

    tokens: list[int]
    salt: bytes
    target: int
    first_word: int
    choices: int
    wake: Callable[[], None]
    prompt: int = 0  # length of the prompt in `tokens`
    chain: list[int] = field(default_factory=list)
    lease: Lease | None = None
    cached: int = 0  # prompt tokens that need no computing; while it waits, as of its arrival
    computed: int = 0  # prompt tokens that are in the KV cache
    made: int = 0

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def blocks(self) -> int:
        return -(-self.prompt // BLOCK) + self.choices * -(-self.target // BLOCK)

    @property
    def resident(self) -> int:
        return self.computed + self.made * self.choices

    @property
    def matchable(self) -> list[int]:
        """At least one prompt token is always computed, or there would be nothing to sample from."""
        return self.chain[: (self.prompt - 1) // BLOCK]


@dataclass(frozen=True, slots=True)
class Step:
    seconds: float
    prefill: list[tuple[Job, int]]
    decode: list[Job]


class Batch:
    def __init__(self, pace: Pace, max_running: int, blocks: Blocks, chunk: int) -> None:
        self._pace = pace
        self._max_running = max_running
        self._blocks = blocks
        self._chunk = chunk
        self.waiting: deque[Job] = deque()
        self.running: dict[Job, None] = {}
        self.steps = 0

    @property
    def resident_tokens(self) -> int:
        return sum(job.resident for job in self.running)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        running = sum(job.prompt - job.computed for job in self.running)
        return running + sum(job.prompt - job.cached for job in self.waiting)

    @property
    def kv_used_ratio(self) -> float:
        return self._blocks.held / self._blocks.capacity

    def add(self, job: Job) -> None:
        """The caller has made sure that `job.blocks` fit an empty engine."""
        extend_chain(job.chain, job.tokens, job.salt)
        job.cached = BLOCK * self._blocks.match(job.matchable)
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """The request is over, wherever it stood; twice does no harm."""
        if job in self.running:
            del self.running[job]
        elif job.lease is None and job in self.waiting:
            self.waiting.remove(job)
        if job.lease is not None:
            self._blocks.give_back(job.lease)
            job.lease = None

    def plan(self) -> Step | None:
        """What the next step computes; None when there is nothing to do. As in vLLM a waiting request is let in only
        where the step has room for tokens of its prompt, and a block can be shared from the step that computes it on:
        so of requests with one prefix, queued behind each other, the first computes it for all.
        """
        decode = [job for job in self.running if job.computed == job.prompt]
        seconds, room = 0.0, max(1, self._chunk - len(decode))
        prefill: list[tuple[Job, int]] = []
        for job in self.running:
            if room and job.computed < job.prompt:
                new = self._begin(job, room)
                room -= new
                seconds += self._pace.prefill_s(new, job.computed)
                prefill.append((job, new))
        while room and self.waiting and len(self.running) < self._max_running and self._admit(self.waiting[0]):
            job = self.waiting.popleft()
            self.running[job] = None
            new = self._begin(job, room)
            room -= new
            seconds += self._pace.prefill_s(new, job.computed)
            prefill.append((job, new))
        if not self.running:
            return None
        if decode:
            seconds += self._pace.decode_s(self.resident_tokens if self._pace.kv_us_per_ktoken else 0)
        return Step(seconds, prefill, decode)

    def finish(self, step: Step) -> None:
        """The step's time is over: its tokens are there, unless their request went away meanwhile."""
        self.steps += 1
        for job, new in step.prefill:
            if job.lease is not None:
                job.computed += new
                if job.computed == job.prompt:
                    self._token(job, job.lease)
        for job in step.decode:
            if job.lease is not None:
                self._token(job, job.lease)

    def _admit(self, job: Job) -> bool:
        """Takes its blocks, if there is room for them."""
        job.lease = self._blocks.take(job.matchable, job.blocks)
        if job.lease is None:
            return False
        job.cached = job.computed = BLOCK * len(job.lease.shared)
        return True

    def _begin(self, job: Job, room: int) -> int:
        """How many tokens of its prompt this step computes."""
        assert job.lease is not None
        new = min(job.prompt - job.computed, room)
        self._blocks.publish(job.lease, job.chain[: (job.computed + new) // BLOCK])
        return new

    def _token(self, job: Job, lease: Lease) -> None:
        job.tokens.append(job.first_word + job.made)
        job.made += 1
        if len(job.tokens) // BLOCK > len(job.chain):
            extend_chain(job.chain, job.tokens, job.salt)
            self._blocks.publish(lease, job.chain)
        if job.made >= job.target:
            self.remove(job)
        job.wake()
