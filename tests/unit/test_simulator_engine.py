"""The simulated engine: hand-computed times, and what must hold whatever arrives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.routing.facts import Facts
from services.gateway.simulator.blocks import BlockCache
from services.gateway.simulator.encoder import EncoderEngine
from services.gateway.simulator.engine import LlmEngine, Pace
from services.gateway.simulator.job import Job
from services.gateway.simulator.trace import Request

PACE = Pace(prefill_tps=1000.0, doubling=1e12, step_s=0.01, kv_s=0.0)


def engine(pace: Pace = PACE, **kwargs: int) -> LlmEngine:
    settings = {"kv_tokens": 100_000, "block_tokens": 100, "budget": 1000, **kwargs}
    return LlmEngine("e", pace, **settings)


def job(index: int, prompt: int, output: int, chain: tuple[int, ...] = (), arrival: float = 0.0) -> Job:
    return Job(Request(index, arrival, prompt, output, chain), 0, Facts("llm", "m"))


@dataclass
class Seen:
    first: dict[int, float]
    done: dict[int, float]


def drive(subject: LlmEngine | EncoderEngine, jobs: list[Job], checks: list[object] | None = None) -> Seen:
    """Everything arrives when it says, and runs to its end."""
    seen = Seen({}, {})
    coming = sorted(jobs, key=lambda one: one.request.arrival)
    while coming or subject.segment is not None:
        arrival = coming[0].request.arrival if coming else float("inf")
        if subject.segment is not None and subject.segment.end <= arrival:
            now = subject.segment.end
            started, done = subject.advance()
            for one in started:
                assert one.request.index not in seen.first
                seen.first[one.request.index] = now
            for one in done:
                assert one.request.index not in seen.done
                seen.done[one.request.index] = now
        else:
            subject.add(coming.pop(0), arrival)
        if checks is not None:
            checks.append((subject.cache.in_use, len(subject.cache.held) + len(subject.cache.free)))  # type: ignore[union-attr]
    return seen


def test_one_request_by_hand() -> None:
    subject = engine()
    seen = drive(subject, [job(0, 2500, 5)])
    # Chunks of 1000, 1000 and 500 at 1,000 tokens/s with nobody decoding, then four more tokens at 10 ms.
    assert seen.first[0] == pytest.approx(2.5)
    assert seen.done[0] == pytest.approx(2.54)
    assert (subject.steps, subject.busy_s) == (7, pytest.approx(2.54))


def test_attention_grows_with_context() -> None:
    subject = engine(Pace(1000.0, 4000.0, 0.01, 0.0))
    # 2000 new tokens after none: 2 s, times 1 + 1000 / 4000, however the prompt is cut into chunks.
    assert drive(subject, [job(0, 2000, 1)]).first[0] == pytest.approx(2.5)
    chopped = engine(Pace(1000.0, 4000.0, 0.01, 0.0), budget=300)
    assert drive(chopped, [job(0, 2000, 1)]).first[0] == pytest.approx(2.5)


def test_cached_tokens_still_cost_attention() -> None:
    subject = engine(Pace(1000.0, 4000.0, 0.01, 0.0))
    shared = tuple(range(10))
    again = job(1, 1500, 1, (*shared, 90, 91, 92, 93, 94), arrival=100.0)
    seen = drive(subject, [job(0, 1000, 1, shared), again])
    assert again.cached == 1000
    assert seen.first[1] - 100.0 == pytest.approx(0.5 * (1 + (1000 + 250) / 4000))


def test_decoding_follows_resident_tokens() -> None:
    subject = engine(Pace(1000.0, 1e12, 0.01, 1e-6))
    seen = drive(subject, [job(0, 1000, 3)])
    # Steps with 1,001 and 1,002 resident tokens.
    assert seen.done[0] - seen.first[0] == pytest.approx(0.02 + 1e-6 * (1001 + 1002))


def test_a_prompt_shares_its_steps_with_decoding() -> None:
    subject = engine()
    seen = drive(subject, [job(0, 100, 100), job(1, 1998, 2, arrival=0.105)])
    # The second comes during the first decode step (0.10 .. 0.11); two chunks of 999 beside one decoding request.
    assert seen.first[0] == pytest.approx(0.1)
    assert seen.first[1] == pytest.approx(0.11 + 2 * (0.999 + 0.01))
    # 99 tokens after the first at 10 ms, of which two steps lasted 0.999 s longer.
    assert seen.done[0] == pytest.approx(0.1 + 99 * 0.01 + 2 * 0.999)


def test_several_short_prompts_share_a_step() -> None:
    seen = drive(engine(), [job(i, 250, 1) for i in range(5)])
    # The first is alone in its step, for the others come after it began; then four fit the budget of 1000.
    assert [round(seen.first[i], 6) for i in range(5)] == [0.25, 1.25, 1.25, 1.25, 1.25]


def test_max_running_and_kv_room_make_requests_wait() -> None:
    narrow = drive(engine(max_running=1), [job(0, 100, 11), job(1, 100, 1)])
    assert narrow.first[1] == pytest.approx(narrow.done[0] + 0.1)
    # 1,000 tokens of KV are ten blocks; each request holds six.
    tight = engine(kv_tokens=1000)
    seen = drive(tight, [job(0, 550, 11), job(1, 550, 1)])
    assert seen.first[1] == pytest.approx(seen.done[0] + 0.55)
    assert tight.refuses(job(2, 1000, 1)) and not tight.refuses(job(2, 999, 1))


def test_a_range_is_refused_and_an_answer_is_cut_at_it() -> None:
    subject = engine(context_max=1000)
    assert subject.refuses(job(0, 1000, 1)) and not subject.refuses(job(0, 999, 50))
    inside = job(1, 990, 50)
    drive(subject, [inside])
    assert inside.output == 10


def test_load_is_told_between_the_ends_of_segments() -> None:
    subject = engine()
    subject.add(job(0, 10_000, 100), 0.0)
    before, later = subject.load(0, 0.5), subject.load(0, 3.5)
    assert (before.queued_tokens, later.queued_tokens) == (10_000, 7_000)
    assert (later.resident_tokens, later.own_queued_tokens, later.running) == (3_000, 7_000, 1)
    assert subject.load(1, 3.5).own_queued_tokens == 0


def test_least_recently_used_blocks_go_first_and_held_ones_never() -> None:
    cache = BlockCache(4)
    assert cache.take((1, 2), 2) == 0
    assert cache.take((3, 4, 5), 3) is None
    cache.give_back((1, 2), 2)
    assert cache.take((1, 9), 2) == 1
    assert cache.match((1, 2)) == 2
    assert cache.take((3, 4), 2) == 0  # needs the room of 2, which nobody holds
    assert cache.match((1, 2)) == 1 and cache.in_use == 4


def test_an_encoder_serves_one_after_another() -> None:
    seen = drive(EncoderEngine("e", 0.01, 1000.0), [job(i, 90, 0) for i in range(3)])
    assert [round(seen.done[i], 6) for i in range(3)] == [0.1, 0.2, 0.3]


requests = st.lists(
    st.tuples(
        st.integers(1, 3000),  # prompt
        st.integers(1, 60),  # output
        st.integers(0, 3),  # which prefix
        st.floats(0, 20),  # arrival
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(requests, st.integers(32, 200), st.integers(1, 8), st.integers(50, 3000))
def test_every_request_ends_once_and_tokens_are_conserved(
    wishes: list[tuple[int, int, int, float]], blocks: int, max_running: int, budget: int
) -> None:
    subject = engine(
        Pace(5000.0, 20_000.0, 0.005, 1e-7), kv_tokens=blocks * 100, max_running=max_running, budget=budget
    )
    jobs = []
    for index, (prompt, output, prefix, arrival) in enumerate(wishes):
        chain = tuple((prefix << 16) + block for block in range(-(-prompt // 100)))
        jobs.append(job(index, prompt, output, chain, arrival))
    jobs = [one for one in jobs if not subject.refuses(one)]
    checks: list[object] = []
    seen = drive(subject, jobs, checks)
    indices = {one.request.index for one in jobs}
    assert set(seen.first) == set(seen.done) == indices
    for used, remembered in checks:  # type: ignore[misc]
        assert used <= blocks and remembered <= blocks
    for one in jobs:
        index = one.request.index
        assert one.request.arrival < seen.first[index] <= seen.done[index]
        assert one.cached + one.computed - one.cached == one.request.prompt and one.left == 0
        assert one.output == min(one.request.output, blocks * 100 - one.request.prompt)
        # No faster than alone with the same cache hits.
        alone = subject.pace.prefill_s(one.request.prompt - one.cached, one.cached)
        assert seen.first[index] - one.request.arrival >= alone * (1 - 1e-9)
        assert seen.done[index] - seen.first[index] >= (one.output - 1) * subject.pace.step_s * (1 - 1e-9)
    load = subject.load(0, 1e9)
    assert (load.running, load.waiting, load.queued_tokens, load.resident_tokens) == (0, 0, 0, 0)
    assert (load.own_running, load.own_queued_tokens, subject.cache.in_use) == (0, 0, 0)
    assert subject.busy_s <= max(seen.done.values()) + 1e-6 if jobs else True


def stepwise(pace: Pace, budget: int, wishes: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """The same engine without a cache, one step at a time, all arriving at 0 before the first step."""
    left = [prompt for prompt, _ in wishes]
    made = [0] * len(wishes)
    first, done = [0.0] * len(wishes), [0.0] * len(wishes)
    now = 0.0
    while any(made[i] < wishes[i][1] for i in range(len(wishes))):
        decoding = [i for i in range(len(wishes)) if not left[i] and 0 < made[i] < wishes[i][1]]
        room = max(1, budget - len(decoding))
        seconds, parts = 0.0, []
        for i in range(len(wishes)):
            if left[i] and room:
                new = min(left[i], room)
                seconds += pace.prefill_s(new, wishes[i][0] - left[i])
                room -= new
                parts.append((i, new))
        if decoding:
            seconds += pace.step_s + pace.kv_s * sum(
                wishes[i][0] - left[i] + made[i] for i in range(len(wishes)) if made[i] < wishes[i][1]
            )
        now += seconds
        for i in decoding:
            made[i] += 1
        for i, new in parts:
            left[i] -= new
            if not left[i]:
                made[i], first[i] = 1, now
        for i in range(len(wishes)):
            if made[i] == wishes[i][1] and not done[i]:
                done[i] = now
    return list(zip(first, done, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 50)), min_size=1, max_size=12), st.integers(20, 2500))
def test_many_steps_at_once_take_as_long_as_one_by_one(wishes: list[tuple[int, int]], budget: int) -> None:
    pace = Pace(5000.0, 20_000.0, 0.005, 1e-7)
    subject = engine(pace, kv_tokens=10_000_000, budget=budget)
    # A first token of a tiny request holds the engine for its step, in which all the others arrive.
    seen = drive(subject, [job(0, 1, 1)] + [job(i + 1, p, o) for i, (p, o) in enumerate(wishes)])
    start = seen.done[0]
    for index, (first, done) in enumerate(stepwise(pace, budget, wishes)):
        assert seen.first[index + 1] - start == pytest.approx(first, rel=1e-9, abs=1e-9)
        assert seen.done[index + 1] - start == pytest.approx(done, rel=1e-9, abs=1e-9)
