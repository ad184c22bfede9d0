"""The scripted engine: its words, its stops, its speed, its queue and its prefix cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Relay, Resume, TokenIds
from services.llm.engine import Event
from services.llm.engines.scripted import ScriptedEngine
from services.llm.engines.scripted_batch import Batch, Job, Pace
from services.llm.engines.scripted_cache import BLOCK, Blocks
from services.llm.engines.scripted_text import StopMatcher, Words
from services.llm.settings import LlmSettings
from tests.kit.mesh import until


@asynccontextmanager
async def engine(**settings: Any) -> AsyncIterator[ScriptedEngine]:
    made = ScriptedEngine(LlmSettings(engine="scripted", model="m", **settings))
    await made.start(lambda line: None)
    try:
        yield made
    finally:
        await made.close()


def complete(text: str = "one two three", *, relay: Relay | None = None, echo: bool = False, **sampling: Any):
    return lm.CompleteRequest(model="m", text=text, sampling=lm.Sampling(**sampling), relay=relay, echo=echo)


def chat(*texts: str, **sampling: Any) -> lm.ChatRequest:
    messages = [lm.Message(role=lm.ROLE_USER, content=text) for text in texts]
    return lm.ChatRequest(model="m", messages=messages, sampling=lm.Sampling(**sampling))


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def text_of(events: list[Event], choice: int = 0) -> str:
    return "".join(delta.content for event in events for delta in event.deltas if delta.choice == choice)


def ids_of(events: list[Event], choice: int = 0) -> list[int]:
    return [i for event in events for delta in event.deltas if delta.choice == choice for i in delta.token_ids]


def words(first: int, last: int) -> str:
    return "".join(f" w{number}" for number in range(first, last))


async def test_answers_count_up_one_word_a_token() -> None:
    async with engine() as scripted:
        events = await collect(scripted.complete(complete(max_tokens=5)))
        assert text_of(events) == " w0 w1 w2 w3 w4"
        assert ids_of(events) == [0, 1, 2, 3, 4]
        assert events[0].prompt is not None and events[0].prompt.tokens == 3
        assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]
        usage = events[-1].usage
        assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (3, 5)
        assert events[-1].deltas[0].finish == lm.FINISH_LENGTH


@pytest.mark.parametrize(
    ("sampling", "count", "finish"),
    [
        ({}, 64, lm.FINISH_STOP),
        ({"max_tokens": 10}, 10, lm.FINISH_LENGTH),
        ({"max_tokens": 100}, 100, lm.FINISH_LENGTH),
        ({"min_tokens": 80}, 80, lm.FINISH_STOP),
        ({"ignore_eos": True}, 500 - 2, lm.FINISH_LENGTH),
        ({"max_tokens": 1 << 31}, 500 - 2, lm.FINISH_LENGTH),
    ],
)
async def test_how_long_an_answer_to_chat_is(sampling: dict[str, Any], count: int, finish: lm.Finish) -> None:
    async with engine(scripted={"max_context": 500 + 1}) as scripted:
        events = await collect(scripted.chat(chat("hello", **sampling)))
        assert len(ids_of(events)) == count
        assert events[-1].deltas[0].finish == finish


async def test_a_completion_has_sixteen_tokens_unless_told_otherwise() -> None:
    async with engine() as scripted:
        assert ids_of(await collect(scripted.complete(complete()))) == list(range(16))


async def test_choices_echo_and_logprobs() -> None:
    async with engine() as scripted:
        events = await collect(scripted.complete(complete("a b", echo=True, n=3, max_tokens=4, logprobs=2)))
        for choice in range(3):
            assert text_of(events, choice) == "a b" + words(0, 4)
            assert ids_of(events, choice) == [0, 1, 2, 3]
        entries = [entry for event in events for entry in event.deltas[0].logprobs]
        assert [entry.token for entry in entries] == [" w0", " w1", " w2", " w3"]
        assert all(len(entry.top) == 2 and entry.top[0].logprob == entry.logprob < 0 for entry in entries)
        usage = events[-1].usage
        assert usage is not None and usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("sampling", "text", "stop"),
    [
        ({"stop": [" w3"]}, words(0, 3), " w3"),
        ({"stop": ["w3 w4"]}, words(0, 3) + " ", "w3 w4"),
        ({"stop": ["w3 w4"], "include_stop": True}, words(0, 5), "w3 w4"),
        ({"stop": ["nowhere", " w1"], "min_tokens": 4}, words(0, 10), " w1"),
        ({"stop_token_ids": [6]}, words(0, 6), 6),
        ({"stop_token_ids": [2], "min_tokens": 5, "max_tokens": 8}, words(0, 8), None),
    ],
)
async def test_stops(sampling: dict[str, Any], text: str, stop: str | int | None) -> None:
    async with engine() as scripted:
        events = await collect(scripted.complete(complete(**{"max_tokens": 40, **sampling})))
        assert text_of(events) == text
        last = events[-1].deltas[0]
        which = last.WhichOneof("stop")
        assert (getattr(last, which) if which else None) == stop
        assert last.finish == (lm.FINISH_LENGTH if stop is None else lm.FINISH_STOP)
        usage = events[-1].usage
        assert usage is not None and usage.completion_tokens == len(ids_of(events))
        assert scripted.load().running == 0


@pytest.mark.parametrize("stop", [[], [" w7 w8"], ["8"]])
async def test_a_resumed_stream_goes_on_where_it_stood(stop: list[str]) -> None:
    async with engine() as scripted:
        whole = await collect(scripted.complete(complete(max_tokens=12, stop=stop)))
        ids, text = ids_of(whole), text_of(whole)
        for cut in range(1, len(ids)):
            matcher = StopMatcher(stop)
            delivered = "".join(matcher.feed(f" w{number}") for number in ids[:cut])
            relay = Relay(resume=Resume(token_ids=ids[:cut]))
            rest = await collect(scripted.complete(complete(max_tokens=12, stop=stop, relay=relay)))
            assert ids[:cut] + ids_of(rest) == ids
            assert delivered + text_of(rest) == text
            assert rest[-1].usage is not None and rest[-1].usage.completion_tokens == len(ids)
            assert rest[0].prompt is not None and rest[0].prompt.tokens == 3


async def test_a_stream_that_had_said_everything_is_only_ended() -> None:
    async with engine() as scripted:
        relay = Relay(resume=Resume(token_ids=range(12)))
        events = await collect(scripted.complete(complete(max_tokens=12, relay=relay)))
        assert (text_of(events), ids_of(events), events[0].deltas[0].finish) == ("", [], lm.FINISH_LENGTH)
        assert events[0].usage is not None and events[0].usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("request_", "reason", "param"),
    [
        (lm.CompleteRequest(text="x", constraint=lm.Constraint(regex="a")), Reason.UNSUPPORTED, "constraint.regex"),
        (complete(prompt_logprobs=0), Reason.UNSUPPORTED, "sampling.prompt_logprobs"),
        (complete(logit_bias={3: 1.0}), Reason.UNSUPPORTED, "sampling.logit_bias"),
        (complete(min_tokens=100, max_tokens=100), Reason.INVALID_ARGUMENT, "sampling.min_tokens"),
        (complete("a " * 200), Reason.CONTEXT_LENGTH_EXCEEDED, "messages"),
        (complete(relay=Relay(resume=Resume(token_ids=[5]))), Reason.INVALID_ARGUMENT, "relay.resume.token_ids"),
        (lm.CompleteRequest(token_ids=TokenIds(ids=[1 << 31]), echo=True), Reason.INVALID_ARGUMENT, "token_ids"),
    ],
)
async def test_what_it_does_not_do_is_refused_by_name(request_: Any, reason: Reason, param: str) -> None:
    async with engine(scripted={"max_context": 100}) as scripted:
        with pytest.raises(MeshError) as caught:
            await collect(scripted.complete(request_))
        assert (caught.value.reason, caught.value.param) == (reason, param)
        assert scripted.load().waiting == scripted.load().running == 0


async def test_an_instance_of_a_smaller_range_tells_the_exact_count() -> None:
    async with engine(context=(0, 50)) as scripted:
        with pytest.raises(MeshError) as caught:
            await collect(scripted.complete(complete("a" + " b" * 59)))
        assert caught.value.reason is Reason.OUT_OF_RANGE
        assert getattr(caught.value, "prompt_tokens", None) == 60 and "60 tokens" in caught.value.message


@given(st.text(max_size=200))
def test_any_text_survives_encoding(text: str) -> None:
    vocabulary = Words()
    assert vocabulary.decode(list(vocabulary.encode(text))) == text


def test_answer_words_are_their_numbers_and_hashes_do_not_depend_on_the_process() -> None:
    assert list(Words().encode(" w0 w17 w007 hello")) == [0, 17, 2996516432, 3327980814]


@given(
    st.lists(st.sampled_from(["a", "ab", "b", "ba", "c"]), max_size=30), st.sets(st.sampled_from(["ab", "aba", "ca"]))
)
def test_stop_matcher_cuts_where_the_whole_text_would_be_cut(pieces: list[str], stops: set[str]) -> None:
    matcher, got = StopMatcher(stops), ""
    for piece in pieces:
        got += matcher.feed(piece)
        if matcher.found:
            break
    else:
        got += matcher.rest()
    text = "".join(pieces)
    hits = [at for at in map(text.find, stops) if at >= 0]
    if not hits:
        assert (got, matcher.found) == (text, "")
    else:
        assert matcher.found and text.startswith(got + matcher.found) and len(got) <= len(text)
        assert not any(stop in got for stop in stops)


async def test_the_second_request_with_the_same_prefix_skips_it() -> None:
    async with engine(speed={"prefill_tps": 4000}) as scripted:
        prompt = "start" + " word" * 999

        async def first_token(text: str, salt: bytes = b"") -> tuple[float, int]:
            began = time.perf_counter()
            events = await collect(scripted.complete(complete(text, max_tokens=1, relay=Relay(cache_salt=salt))))
            assert events[0].prompt is not None and events[0].prompt.tokens >= 1000
            return time.perf_counter() - began, events[0].prompt.cached

        cold_s, cold = await first_token(prompt)
        warm_s, warm = min([await first_token(f"{prompt} more {number}") for number in range(3)])
        salted_s, salted = await first_token(prompt, b"another tenant")
        assert (cold, warm, salted) == (0, 1000 // BLOCK * BLOCK, 0)
        assert cold_s > 0.24 > warm_s and salted_s > 0.24


async def test_a_conversation_finds_its_own_answer_in_the_cache() -> None:
    async with engine() as scripted:
        request = chat("tell me " + "everything " * 30)
        answer = await collect(scripted.chat(request))
        request.messages.append(lm.Message(role=lm.ROLE_ASSISTANT, content=text_of(answer)))
        request.messages.append(lm.Message(role=lm.ROLE_USER, content="go on"))
        events = await collect(scripted.chat(request))
        facts = events[0].prompt
        assert facts is not None and facts.cached == (facts.tokens - 4) // BLOCK * BLOCK > 64


async def test_the_speed_is_that_of_the_model() -> None:
    async with engine(speed={"step_ms": 10, "kv_us_per_ktoken": 10_000}) as scripted:
        began = time.perf_counter()
        await collect(scripted.complete(complete("a" + " b" * 999, max_tokens=11)))
        took = time.perf_counter() - began
        assert 0.19 < took < 5  # ten steps of 10 ms + 10 ms a resident kilotoken


def test_prefill_grows_with_the_context() -> None:
    pace = Pace(prefill_tps=1000, prefill_doubling_ctx=10_000)
    assert pace.prefill_s(1000, 0) == pytest.approx(1.05)
    assert pace.prefill_s(1000, 9500) == pytest.approx(2.0)
    parts = sum(pace.prefill_s(100, at) for at in range(0, 1000, 100))
    assert parts == pytest.approx(pace.prefill_s(1000, 0))


async def test_requests_beyond_the_batch_wait_and_cancelled_ones_leave_at_once() -> None:
    async with engine(speed={"step_ms": 5}, max_running=2) as scripted:
        tasks = [asyncio.create_task(collect(scripted.complete(complete(max_tokens=400)))) for _ in range(5)]
        await until(lambda: scripted.load().steps > 3, 20)
        load = scripted.load()
        assert (load.running, load.waiting, load.queued_tokens) == (2, 3, 9)
        assert load.resident_tokens > 6 and 0 < load.kv_used_ratio < 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        load = scripted.load()
        assert (load.running, load.waiting, load.resident_tokens, load.kv_used_ratio) == (0, 0, 0, 0)


async def test_when_the_kv_cache_is_full_the_next_one_waits() -> None:
    async with engine(speed={"step_ms": 5}, kv_tokens=160) as scripted:
        big = [asyncio.create_task(collect(scripted.complete(complete(max_tokens=100)))) for _ in range(3)]
        await until(lambda: (scripted.load().running, scripted.load().waiting) == (1, 2), 20)
        done = await asyncio.gather(*big)
        assert [len(ids_of(events)) for events in done] == [100] * 3
        with pytest.raises(MeshError, match="KV cache"):
            await collect(scripted.complete(complete(max_tokens=200)))


async def test_told_to_fail_it_fails() -> None:
    async with engine(scripted={"fail_after_tokens": 3}, speed={"step_ms": 1}) as scripted:
        seen: list[Event] = []
        with pytest.raises(MeshError) as caught:
            async for event in scripted.complete(complete()):
                seen.append(event)
        assert caught.value.reason is Reason.ENGINE_FAILED and len(ids_of(seen)) == 3
        assert scripted.load().running == 0
    with pytest.raises(MeshError, match="told to fail at start"):
        async with engine(scripted={"fail_start": True}):
            pass


async def test_tokenize_and_detokenize_agree_with_what_is_counted() -> None:
    async with engine() as scripted:
        text = "One  line,\nand w5 another w5."
        ids = (await scripted.tokenize(lm.TokenizeRequest(text=text))).token_ids
        assert (await scripted.detokenize(lm.DetokenizeRequest(token_ids=ids))).text == text
        request = chat(text)
        reply = await scripted.tokenize(lm.TokenizeRequest(chat=lm.Conversation(messages=request.messages)))
        events = await collect(scripted.chat(request))
        assert events[0].prompt is not None and events[0].prompt.tokens == len(reply.token_ids) == len(reply.tokens)
        assert reply.max_context == 32768


_STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "drop", "step"]), st.integers(0, 5), st.integers(1, 70)), max_size=80
)


@given(_STEPS)
def test_blocks_are_counted_exactly_whatever_comes_and_goes(steps: list[tuple[str, int, int]]) -> None:
    blocks = Blocks(24)
    batch = Batch(Pace(), 3, blocks, 32)
    jobs: list[Job] = []
    wake: Callable[[], None] = lambda: None  # noqa: E731
    for what, number, size in steps:
        if what == "add":
            job = Job([number] * size, b"", target=1 + size % 40, first_word=0, choices=1 + number % 2, wake=wake)
            if job.blocks <= blocks.capacity:
                batch.add(job)
                jobs.append(job)
        elif what == "drop" and jobs:
            batch.remove(jobs.pop(number % len(jobs)))
        elif (step := batch.plan()) is not None:
            batch.finish(step)
        assert 0 <= blocks.held <= blocks.capacity and blocks.cached <= blocks.capacity
        assert len(batch.running) <= 3
    for _ in range(10_000):
        step = batch.plan()
        if step is None:
            break
        batch.finish(step)
    assert not batch.running and not batch.waiting and blocks.held == 0
