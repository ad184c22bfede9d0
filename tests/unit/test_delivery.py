"""Merging events: nothing lost, nothing doubled, nothing reordered, the first never held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Usage
from services.llm.delivery import Coalescer
from services.llm.engine import Event, PromptFacts
from services.llm.service import paced


def _event(*deltas: lm.Delta, last: bool = False, first: bool = False) -> Event:
    return Event(list(deltas), PromptFacts(3) if first else None, Usage(completion_tokens=9) if last else None)


def _delta(choice: int, *ids: int, **fields: object) -> lm.Delta:
    return lm.Delta(choice=choice, token_ids=ids, content="".join(f"<{i}>" for i in ids), **fields)


def test_without_an_interval_every_event_goes_out_as_it_is() -> None:
    coalescer = Coalescer(0)
    for number in range(3):
        event = _event(_delta(0, number))
        assert coalescer.offer(event, 0.0) is event
        assert coalescer.due is None


def test_the_first_event_is_never_held_and_the_next_waits_for_the_interval() -> None:
    coalescer = Coalescer(0.25)
    first = _event(_delta(0, 1), first=True)
    assert coalescer.offer(first, 10.0) is first
    assert coalescer.due is None
    assert coalescer.offer(_event(_delta(0, 2)), 10.1) is None
    assert coalescer.due == 10.25
    assert coalescer.offer(_event(_delta(0, 3)), 10.2) is None
    sent = coalescer.flush(10.25)
    assert sent is not None and list(sent.deltas[0].token_ids) == [2, 3]
    assert coalescer.due is None
    assert coalescer.offer(_event(_delta(0, 4)), 10.4) is None
    assert coalescer.due == 10.5
    assert coalescer.offer(_event(_delta(0, 5)), 10.6) is not None


def test_the_last_event_carries_everything_that_was_held() -> None:
    coalescer = Coalescer(10)
    coalescer.offer(_event(_delta(0, 1)), 0.0)
    assert coalescer.offer(_event(_delta(0, 2), _delta(1, 7)), 0.1) is None
    last = coalescer.offer(_event(_delta(0, 3, finish=lm.FINISH_STOP, stop_text="x"), last=True), 0.2)
    assert last is not None and last.usage is not None
    zero, one = last.deltas
    assert (list(zero.token_ids), zero.content, zero.finish, zero.stop_text) == ([2, 3], "<2><3>", lm.FINISH_STOP, "x")
    assert (one.choice, list(one.token_ids), one.finish) == (1, [7], lm.FINISH_UNSPECIFIED)


def test_tool_calls_are_joined_by_index_and_logprobs_kept_in_order() -> None:
    coalescer = Coalescer(10)
    coalescer.offer(_event(_delta(0, 1)), 0.0)
    call = lm.ToolCallDelta
    for number, calls in enumerate(
        (
            [call(index=0, id="a", name="f", arguments_json="{")],
            [call(index=0, arguments_json="}"), call(index=1, id="b", name="g")],
            [call(index=1, arguments_json="[]")],
        )
    ):
        delta = lm.Delta(tool_calls=calls, logprobs=[lm.TokenLogprob(token_id=number)], reasoning=str(number))
        coalescer.offer(_event(delta), 0.1)
    sent = coalescer.flush(1.0)
    assert sent is not None
    merged = sent.deltas[0]
    assert [(c.index, c.id, c.name, c.arguments_json) for c in merged.tool_calls] == [
        (0, "a", "f", "{}"),
        (1, "b", "g", "[]"),
    ]
    assert [entry.token_id for entry in merged.logprobs] == [0, 1, 2]
    assert merged.reasoning == "012"


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1), st.booleans()), min_size=1, max_size=60),
    interval=st.floats(0, 3),
)
def test_whatever_the_timing_each_choice_gets_its_tokens_in_order_once(
    steps: list[tuple[int, float, bool]], interval: float
) -> None:
    coalescer = Coalescer(interval)
    now, sent, want = 0.0, [], {}
    for number, (choice, pause, timer) in enumerate(steps):
        now += pause
        if timer and coalescer.due is not None and coalescer.due <= now:
            sent.append(coalescer.flush(now))
        want.setdefault(choice, []).append(number)
        sent.append(coalescer.offer(_event(_delta(choice, number), last=number == len(steps) - 1), now))
    got: dict[int, list[int]] = {}
    for event in filter(None, sent):
        for delta in event.deltas:
            got.setdefault(delta.choice, []).extend(delta.token_ids)
    assert got == want
    assert sent[0] is not None and coalescer.due is None


@pytest.mark.parametrize("interval", [0.0, 60.0])
async def test_leaving_while_the_engine_says_nothing_closes_it_at_once(interval: float) -> None:
    closed = asyncio.Event()

    async def engine() -> AsyncIterator[Event]:
        try:
            yield _event(_delta(0, 1), first=True)
            await asyncio.Event().wait()
        finally:
            closed.set()

    stream = paced(engine(), interval)
    assert (await anext(stream)).prompt is not None
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait_for(closed.wait(), 5)
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_what_is_held_goes_out_on_time_and_a_fault_comes_through() -> None:
    async def engine() -> AsyncIterator[Event]:
        yield _event(_delta(0, 1), first=True)
        yield _event(_delta(0, 2))
        yield _event(_delta(0, 3))
        await asyncio.sleep(0.3)
        raise RuntimeError("broken")

    got: list[list[int]] = []
    with pytest.raises(RuntimeError, match="broken"):
        async for event in paced(engine(), 0.1):
            got.append(list(event.deltas[0].token_ids))
    assert got == [[1], [2, 3]]
