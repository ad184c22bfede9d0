"""Who overtakes whom, how often, and that the instance, its engine and the gateway keep one and the same order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infermesh.v1.inference_pb2 import Relay, Usage
from infermesh.v1.worker_pb2 import Load
from registry.endpoint import Endpoint, Speed
from services.chassis.arrivals import Arrivals
from services.chassis.granting import FIRST_RANKS, Arbiter, Grant, Want
from services.chassis.preemption import AGAIN_US, LEAST_US, TIMES, patience
from services.chassis.prompt_line import US, Pending, PromptLine
from services.chassis.room import Room, Turn
from services.llm.engine import Event, PromptFacts
from services.llm.in_turn import in_turn

S = US


def line(*prompts: Pending, now: float = 0.0) -> PromptLine:
    made = PromptLine()
    made.preempts = True
    for prompt in prompts:
        made.add(prompt, now)
    return made


def long(number: int = 1, work: int = 40 * S, **fields: int) -> Pending:
    return Pending(number, "a", work, **{"patience": work, **fields})


def test_patience_is_what_can_be_spared_and_never_more_than_its_own_work() -> None:
    assert patience(LEAST_US, 9.0) == 0, "nobody needs to overtake that"
    assert patience(40 * S, 1e6) == 40 * S
    assert 0 < patience(4 * S, 1.0) < 1 * S, "still on time"
    assert patience(40 * S, -1.0) == 40 * S, "late in any case"


def test_a_shorter_prompt_goes_before_a_longer_one_that_has_begun() -> None:
    prompts = line(long())
    assert prompts.left(10.0) == 30 * S and prompts.left(10.0, S) == 0
    prompts.add(Pending(2, "a", S), 10.0)
    assert prompts.orders(10.0, S // 5, 0) == ([1], []), "put aside"
    assert prompts.work == 31 * S, "what was computed of it is not to be computed again"
    assert prompts.left(10.5) == pytest.approx(30.5 * S), "the shorter one progresses now"
    assert prompts.due(S // 5, 0) == pytest.approx(10.8, abs=1e-3), "when the queue is short enough"
    assert prompts.orders(10.8, S // 5, 0) == ([], [1]), "and goes on"
    prompts.remove(2, 11.0, computed=True)
    assert prompts.left(21.0) == 20 * S


def test_who_is_not_overtaken() -> None:
    for first, newcomer in (
        (long(work=40 * S, patience=0), Pending(2, "a", S)),
        (long(work=40 * S, rank=0), Pending(2, "a", S, rank=1)),
        (long(work=TIMES * S + LEAST_US), Pending(2, "a", S)),
        (long(work=40 * S), Pending(2, "a", 0)),
    ):
        prompts = line(first, newcomer)
        assert prompts.orders(0.0, S, 0) == ([], []) and prompts.first is first
    unable = PromptLine()
    unable.add(long(), 0.0)
    unable.add(Pending(2, "a", S), 0.0)
    assert unable.orders(0.0, S, 0) == ([], [])


def test_what_the_engine_tells_of_a_prompt_goes_before_the_clock() -> None:
    prompts = line(long(tokens=8000), Pending(2, "a", 60 * S, tokens=6000))
    prompts.compute(2000, 1.0)
    assert prompts.left(1.0) == 90 * S, "ten seconds of it, whatever the clock says"
    assert prompts.left(2.0) == 89 * S, "and from then on the clock"
    prompts.compute(2000, 8.0)
    assert (prompts.left(8.0), prompts.tokens_of("a"), prompts.tokens_of("b")) == (80 * S, 10_000, 0)
    prompts.compute(5000, 9.0)
    assert prompts.left(9.0) == 50 * S, "what is left of a step is the next one's"
    prompts.remove(1, 9.0, computed=True)
    prompts.compute(9000, 10.0)
    assert (prompts.work, prompts.tokens_of()) == (0, 0)


def test_a_step_that_runs_while_its_prompt_is_overtaken_is_that_prompts() -> None:
    prompts = line(long(tokens=8000))
    prompts.compute(2000, 10.0)
    prompts.add(Pending(2, "a", S, tokens=400), 11.0)
    assert prompts.orders(11.0, S // 5, 0).aside == [1]
    prompts.compute(2000, 12.0)
    assert (prompts.left(12.0), prompts.tokens_of()) == (21 * S, 4400), "twenty seconds of the first, all of the second"
    assert prompts.orders(12.0, S // 5, 0).again == [], "which has only now begun"
    prompts.compute(400, 12.9)
    assert prompts.orders(12.9, S // 5, 0).again == [1]


def test_a_step_of_a_prompt_that_was_given_up_is_nobody_elses() -> None:
    prompts = line(long(tokens=8000), Pending(2, "a", 50 * S, tokens=9000))
    prompts.compute(2000, 10.0)
    prompts.remove(1, 11.0, computed=False)
    prompts.compute(2000, 12.0)
    assert (prompts.left(12.0), prompts.tokens_of()) == (50 * S, 9000)
    prompts.compute(900, 13.0)
    assert prompts.left(13.0) == 45 * S


def test_a_prompt_whose_first_token_is_on_its_way_shields_nobody() -> None:
    prompts = line(Pending(1, "a", S, tokens=100), long(2))
    prompts.compute(100, 1.0)
    prompts.add(Pending(3, "a", S), 1.0)
    assert prompts.orders(1.0, S, 0).aside == [2]


def test_patience_ends() -> None:
    prompts = line(long(work=10 * S))
    for number in range(2, 40):
        prompts.add(Pending(number, "a", S), 0.0)
    assert prompts.orders(0.0, 0, 0).aside == [1, *range(12, 40)], "ten went before it, the others wait for it"
    for number in range(2, 12):
        prompts.remove(number, 0.0, computed=True)
    assert prompts.first is not None and prompts.first.number == 1


def test_tiny_prompts_spend_patience_too() -> None:
    prompts = line(long(work=9 * S))
    for number in range(2, 200):
        prompts.add(Pending(number, "a", S // 250), 0.0)
    ahead = [prompt.number for prompt in prompts._line.values()].index(1)
    assert ahead == 9 * S // AGAIN_US, "it is rendered and begun again each time"
    assert prompts._line[1].patience == 0


def test_prompts_that_end_with_the_step_that_runs_are_not_thrown_out_of_it() -> None:
    prompts = PromptLine()
    prompts.preempts, prompts.step_us = True, 10 * S
    prompts.add(Pending(1, "a", S // 10), 0.0)
    prompts.add(long(2, work=7 * S), 0.0)
    prompts.add(Pending(3, "a", S // 10), 3.0)
    assert prompts.orders(3.0, S // 5, 0) == ([], []) and prompts.left(3.0) == pytest.approx(4.2 * S)


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_in_the_engine_are_always_the_first_of_the_line_and_nothing_stays_behind(seed: int) -> None:
    random, prompts = Random(seed), line()
    engine: list[int] = []
    works: dict[int, int] = {}
    now = 0.0
    for number in range(1, 60):
        now += random.random()
        if engine and random.random() < 0.5:
            gone = random.choice(engine) if random.random() < 0.2 else engine[0]
            engine.remove(gone)
            prompts.remove(gone, now, computed=True)
        else:
            work = round(random.choice((0.05, 0.3, 2, 9, 50)) * S * random.random())
            prompt = Pending(number, "a", work, patience(work, random.uniform(-5, 30)), random.choice((0, 1)))
            before = prompts.left(now, work, prompt.rank)
            prompts.add(prompt, now)
            works[number] = work
            assert before <= prompts.left(now) - work + 1
            if not prompt.aside:
                engine.append(number)
        aside, again = prompts.orders(now, S // 5, 0)
        engine = [number for number in engine if number not in aside] + again
        standing = list(prompts._line.values())
        assert [p.number for p in standing[: len(engine)]] == engine, "first come first served in the engine, too"
        assert all(p.aside for p in standing[len(engine) :]) and (engine or not standing)
        assert prompts.work == sum(p.work for p in standing) and all(
            0 <= p.patience <= works[p.number] for p in standing
        )
    while engine:
        now += 1.0
        prompts.remove(engine.pop(0), now, computed=True)
        engine += prompts.orders(now, S // 5, 0).again
    assert not len(prompts) and prompts.work == 0


def test_an_arbiter_grants_to_who_overtakes_and_not_to_who_would_wait() -> None:
    room = Arbiter(0.2, preempts=True)
    for gateway in ("a", "b"):
        room.joined(gateway)
    first, _ = room.arrive("a", 0.0, 40 * S, patience_us=40 * S)
    room.want("b", Want(7, 30 * S), 1.0)
    assert room.grants(1.0) == [], "39 s are left: not twice as much"
    room.want("b", Want(8, S), 1.0)
    assert room.grants(1.0) == [Grant("b", 8)]
    second, _ = room.arrive("b", 1.0, S, 0, 8)
    assert room.orders(1.0) == ([first], [])
    room.started(second, 2.0)
    assert room.orders(2.0) == ([], [first])
    for number in (first, second):
        room.ended(number, 3.0)
    for gateway in ("a", "b"):
        room.left(gateway)
    assert not any(room.in_use().values())


def test_who_is_first_to_be_asked_for_overtakes_by_its_class_only() -> None:
    room = Arbiter(0.2, preempts=True)
    for gateway in ("a", "b"):
        room.joined(gateway)
    room.arrive("a", 0.0, 40 * S, patience_us=40 * S, rank=0)
    room.want("b", Want(7, S, rank=1 - FIRST_RANKS), 1.0)
    assert room.grants(1.0) == [], "overdue, and of a class that goes after the one which is computed"
    room.want("b", Want(8, S, rank=0 - FIRST_RANKS), 1.0)
    assert room.grants(1.0) == [Grant("b", 8)]


def test_a_grant_not_yet_used_keeps_who_was_put_aside_waiting() -> None:
    room = Arbiter(0.2, preempts=True)
    for gateway in ("a", "b"):
        room.joined(gateway)
    first, _ = room.arrive("a", 0.0, 40 * S, patience_us=40 * S)
    second, _ = room.arrive("b", 0.0, 0, 0)
    room.ended(second, 0.0)
    room.want("b", Want(8, S), 0.0)
    assert room.grants(0.0) and room.orders(0.0) == ([], []), "it computes until somebody comes"
    number, _ = room.arrive("b", 0.1, S, 0, 8)
    assert room.orders(0.1) == ([first], []) and room.aside(first)
    room.ended(number, 0.2)
    assert room.orders(0.2) == ([], [first]) and not room.aside(first)


# -- the instance ---------------------------------------------------------------------------------------------------


def arrivals() -> Arrivals:
    made = Arrivals(Room())
    speed = Speed(prefill_tps=1000.0, prefill_doubling_ctx=50_000.0, step_ms=10.0)
    endpoint = Endpoint(id="a", kind="llm", host="h", port=1, model="m", incarnation=1, speed=speed)
    made.room.fit(endpoint, Load, preempts=True)
    return made


class Engine:
    """Begins answers, and ends them when told."""

    def __init__(self) -> None:
        self.begun = self.closed = 0
        self.ready = asyncio.Event()

    async def answer(self) -> AsyncIterator[Event]:
        self.begun += 1
        try:
            await self.ready.wait()
            yield Event(prompt=PromptFacts(9, cached=8))
            yield Event(usage=Usage(prompt_tokens=9, cached_tokens=8))
        finally:
            self.closed += 1


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_who_leaves_the_end_of_the_line_does_not_make_its_head_begin_anew() -> None:
    now = [0.0]
    entries = Arrivals(Room(lambda: now[0]))
    with entries.enter(Relay(gateway_id="g", work_us=40 * S), 9):
        with entries.enter(Relay(gateway_id="g", work_us=40 * S), 9):
            now[0] = 10.0
        assert entries.room.arbiter.wait_us(10.0) == 30 * S
    assert not any(entries.room.arbiter.in_use().values())


async def test_an_answer_that_somebody_else_cancels_is_not_begun_again() -> None:
    begun = []

    async def cancelled() -> AsyncIterator[Event]:
        begun.append(1)
        raise asyncio.CancelledError
        yield Event()

    with pytest.raises(asyncio.CancelledError):
        await _all(in_turn(cancelled, Turn(True), 0))
    assert begun == [1]


async def test_who_is_overtaken_leaves_the_engine_and_is_begun_again() -> None:
    entries, engine = arrivals(), Engine()
    relay = Relay(gateway_id="g", work_us=40 * S, patience_us=40 * S)
    with entries.enter(relay, 9, movable=True) as entry:
        assert entry.turn is not None
        answer = asyncio.ensure_future(_all(in_turn(engine.answer, entry.turn, 3)))
        await settled()
        assert (engine.begun, engine.closed) == (1, 0)
        with entries.enter(Relay(gateway_id="g", work_us=S), 9, movable=True) as other:
            assert other.turn is None, "it never leaves the engine"
            await settled()
            assert (engine.begun, engine.closed) == (1, 1)
            other.started()
            await settled()
            assert (engine.begun, engine.closed) == (2, 1)
        engine.ready.set()
        first, last = await answer
        assert first.prompt is not None and first.prompt.preempted == 1
        assert first.prompt.cached == 3, "its own first attempt is no cache of the caller's"
        assert last.usage is not None and last.usage.cached_tokens == 3
        assert (engine.begun, engine.closed) == (2, 2)


async def test_an_answer_that_was_never_overtaken_is_told_as_it_is_and_none_is_overtaken_after_its_first_token() -> (
    None
):
    entries, engine = arrivals(), Engine()
    engine.ready.set()
    with entries.enter(Relay(gateway_id="g", work_us=40 * S, patience_us=40 * S), 9, movable=True) as entry:
        assert entry.turn is not None
        events = in_turn(engine.answer, entry.turn, 3)
        first = await anext(events)
        entry.started()
        assert entry.turn is None
        with entries.enter(Relay(gateway_id="g", work_us=S), 9, movable=True):
            last = await anext(events)
        assert first.prompt is not None and (first.prompt.cached, first.prompt.preempted) == (8, 0)
        assert last.usage is not None and last.usage.cached_tokens == 8 and engine.begun == 1
        await events.aclose()


async def test_prompts_that_cannot_be_moved_stay() -> None:
    entries = arrivals()
    with entries.enter(Relay(gateway_id="g", work_us=40 * S, patience_us=40 * S), 9) as entry:
        assert entry.turn is None
        with entries.enter(Relay(gateway_id="g", work_us=S), 9):
            assert entries.room.arbiter.orders(0.0) == ([], [])


async def test_who_goes_away_while_put_aside_leaves_nothing_behind() -> None:
    entries, engine = arrivals(), Engine()
    turn = Turn(True)
    answer = asyncio.ensure_future(_all(in_turn(engine.answer, turn, 0)))
    await settled()
    turn.over()
    await settled()
    assert (engine.begun, engine.closed) == (1, 1)
    answer.cancel()
    await asyncio.wait({answer})
    turn.mine.set()
    await settled()
    assert engine.begun == 1
    relay = Relay(gateway_id="g", work_us=40 * S, patience_us=40 * S)
    with entries.enter(relay, 9, movable=True), entries.enter(Relay(gateway_id="g", work_us=S), 9):
        pass
    used = entries.room.arbiter.in_use()
    assert not any(used.values()) and not entries.room._turns


async def test_an_engine_that_breaks_breaks_the_answer() -> None:
    async def broken() -> AsyncIterator[Event]:
        raise ValueError("broken")
        yield Event()

    with pytest.raises(ValueError, match="broken"):
        await _all(in_turn(broken, Turn(True), 0))


async def _all(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]
