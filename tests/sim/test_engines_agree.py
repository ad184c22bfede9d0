"""The simulator's engine and the scripted one are two writings of one model (DESIGN §6).

They must agree on who is served when and from what cache, also where prompts queue and the KV room is short.
docs/crosscheck.md says why it matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from statistics import mean

import pytest

from services.gateway.routing.facts import Facts
from services.gateway.simulator import engine as simulated
from services.gateway.simulator.job import Job
from services.gateway.simulator.trace import Request, chain_of
from services.llm.engines import scripted_batch as scripted
from services.llm.engines.scripted_cache import BLOCK, Blocks

PREFILL_TPS, DOUBLING, STEP_MS, KV_US, CHUNK = 900.0, 1530.0, 12.0, 1700.0, 102
KV_TOKENS = 9296
Told = dict[int, tuple[float, int]]  # request -> seconds to the first token, tokens found in the cache


@dataclass(frozen=True)
class Ask:
    at: float
    conversation: int
    prompt: int
    output: int


def asks(seed: int, rps: float) -> list[Ask]:
    """Turns of conversations, each as long as its last one and some more."""
    random = Random(seed)
    lengths: dict[int, int] = {}
    found, at = [], 0.0
    for _ in range(120):
        conversation = random.randrange(12)
        lengths[conversation] = lengths.get(conversation, random.randrange(50, 1200)) + random.randrange(1, 150)
        found.append(Ask(at, conversation, lengths[conversation], random.randrange(1, 20)))
        at += random.expovariate(rps)
    return found


def by_scripted(wanted: list[Ask]) -> Told:
    """The batch in virtual time. Requests are let in between steps, as by the event loop."""
    pace = scripted.Pace(PREFILL_TPS, DOUBLING, STEP_MS, KV_US)
    batch = scripted.Batch(pace, 256, Blocks(KV_TOKENS // BLOCK), CHUNK)
    jobs: list[scripted.Job] = []
    told: Told = {}
    now = 0.0
    while len(told) < len(wanted):
        step = batch.plan()
        now = now + step.seconds if step is not None else wanted[len(jobs)].at
        while len(jobs) < len(wanted) and wanted[len(jobs)].at <= now:
            ask = wanted[len(jobs)]
            tokens = [ask.conversation * 100_000 + place for place in range(ask.prompt)]
            jobs.append(scripted.Job(tokens, b"", ask.output, 0, 1, wake=lambda: None))
            batch.add(jobs[-1])
        if step is not None:
            batch.finish(step)
        for index, job in enumerate(jobs):
            if job.made and index not in told:
                told[index] = (now - wanted[index].at, job.cached)
    return told


def by_simulator(wanted: list[Ask]) -> Told:
    pace = simulated.Pace(PREFILL_TPS, DOUBLING, STEP_MS / 1000, KV_US / 1e9)
    engine = simulated.LlmEngine("e", pace, kv_tokens=KV_TOKENS, block_tokens=BLOCK, max_running=256, budget=CHUNK)
    told: Told = {}
    left = []
    for index, ask in enumerate(wanted):
        blocks = [ask.conversation * 100_000 + place for place in range(ask.prompt // BLOCK)]
        request = Request(index, ask.at, ask.prompt, ask.output, chain_of(blocks, ""))
        left.append(Job(request, 0, Facts("llm", "m")))
    left.reverse()
    while left or engine.segment is not None:
        if engine.segment is not None and (not left or engine.segment.end <= left[-1].request.arrival):
            now = engine.segment.end
            for job in engine.advance()[0]:
                told[job.request.index] = (now - job.request.arrival, job.cached)
        else:
            job = left.pop()
            engine.add(job, job.request.arrival)
    return told


@pytest.mark.parametrize("rps", [0.5, 3.0, 12.0])  # hardly ever two at once; now and then; far over what it can do
def test_two_writings_of_one_model_agree(rps: float) -> None:
    for seed in range(3):  # answers, which only the scripted engine keeps in its cache, leave it a little less room
        wanted = asks(seed, rps)
        real, sim = by_scripted(wanted), by_simulator(wanted)
        assert mean(one[0] for one in sim.values()) == pytest.approx(mean(one[0] for one in real.values()), rel=0.06)
        cached = [sum(one[1] for one in told.values()) for told in (real, sim)]
        assert cached[1] == pytest.approx(cached[0], rel=0.03)
        assert cached[0] > 0.2 * sum(ask.prompt for ask in wanted), "there is something to agree on"


def test_both_keep_what_is_computed_of_a_prompt_that_is_put_aside() -> None:
    long, short, at = Ask(0.0, 1, 3000, 5), Ask(1.0, 2, 300, 5), 1.0
    real, sim = _aside_by_scripted(long, short, at), _aside_by_simulator(long, short, at)
    alone = simulated.Pace(PREFILL_TPS, DOUBLING, STEP_MS / 1000, KV_US / 1e9).prefill_s(long.prompt, 0)
    assert sim[0] == pytest.approx(real[0], rel=0.03) and sim[0] < alone / 2, "it went before the longer one"
    assert sim[1] == pytest.approx(real[1], rel=0.03) and alone < sim[1] < alone + sim[0] + 0.5, "nothing is lost"


def _aside_by_scripted(long: Ask, short: Ask, at: float) -> tuple[float, float]:
    """Times of the first tokens, from 0: of the short one and of the long one, which is begun anew behind it."""
    batch = scripted.Batch(scripted.Pace(PREFILL_TPS, DOUBLING, STEP_MS, KV_US), 256, Blocks(KV_TOKENS // BLOCK), CHUNK)

    def job(ask: Ask) -> scripted.Job:
        tokens = [ask.conversation * 100_000 + place for place in range(ask.prompt)]
        return scripted.Job(tokens, b"", ask.output, 0, 1, wake=lambda: None)

    jobs, now = [job(long)], 0.0
    batch.add(jobs[0])
    told: dict[int, float] = {}
    while len(told) < 2:
        step = batch.plan()
        assert step is not None
        now += step.seconds
        batch.finish(step)
        if now >= at and len(jobs) == 1:
            batch.remove(jobs[0])
            jobs += [job(short), job(long)]
            batch.add(jobs[1])
            batch.add(jobs[2])
        for index, each in enumerate(jobs):
            if each.made:
                told.setdefault(index, now)
    return told[1], told[2]


def _aside_by_simulator(long: Ask, short: Ask, at: float) -> tuple[float, float]:
    pace = simulated.Pace(PREFILL_TPS, DOUBLING, STEP_MS / 1000, KV_US / 1e9)
    engine = simulated.LlmEngine("e", pace, kv_tokens=KV_TOKENS, block_tokens=BLOCK, max_running=256, budget=CHUNK)

    def job(index: int, ask: Ask) -> Job:
        blocks = [ask.conversation * 100_000 + place for place in range(ask.prompt // BLOCK)]
        return Job(Request(index, ask.at, ask.prompt, ask.output, chain_of(blocks, "")), 0, Facts("llm", "m"))

    first, second = job(0, long), job(1, short)
    engine.add(first, 0.0)
    assert engine.put_aside(first, at), "the step that runs is its last one"
    engine.add(second, at)
    engine.add(first, at)
    told: dict[int, float] = {}
    while engine.segment is not None:
        now = engine.segment.end
        for started in engine.advance()[0]:
            told[started.request.index] = now
    assert first.cached == 0 and engine.cache.in_use == 0
    load = engine.load(0, now)
    assert (load.queued_tokens, load.own_queued_tokens, load.own_running, load.resident_tokens) == (0, 0, 0, 0)
    return told[1], told[0]
