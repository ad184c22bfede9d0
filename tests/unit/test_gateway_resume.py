"""What may be resumed, where, and how exact that is; and streams that are lost in ways that no process shows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Usage
from registry.endpoint import Endpoint, Hardware
from services.chassis.rpc import abort
from services.gateway.routing.facts import Facts
from services.gateway.upstream import resume
from services.gateway.upstream.calls import Call, Method
from services.gateway.upstream.transcript import Transcript
from tests.kit.fake_instance import FakeInstance, fake_instance
from tests.kit.upstream import REQUEST_ID, Upstream, request, upstream

TOKENS = 8
ALIKE = {"weights_version": "w1", "tokenizer_digest": "t1", "template_digest": "p1", "engine": "vllm"}
ORIGIN = Endpoint("a", "llm", "127.0.0.1", 1, "m", features=frozenset({"resume"}), dtype="bfloat16", **ALIKE)


def said(*ids: int, **more: Any) -> Transcript:
    transcript = Transcript()
    transcript.started = lm.Started(id="x", created=5, prompt_tokens=100, cached_tokens=64)
    transcript.take(lm.Delta(token_ids=ids, **more))
    return transcript


def asked(**given: Any) -> lm.ChatRequest:
    made = request()
    made.MergeFrom(lm.ChatRequest(**given))
    return made


def test_what_has_a_state_beside_its_ids_is_refused_by_name() -> None:
    refused = [
        (asked(sampling=lm.Sampling(n=2)), "more than one choice"),
        (asked(sampling=lm.Sampling(prompt_logprobs=0)), "prompt_logprobs"),
        (asked(constraint=lm.Constraint(regex="a*")), "a grammar"),
        (
            asked(tools=[lm.Tool(name="f")], tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_REQUIRED)),
            "a forced tool",
        ),
    ]
    for message, why in refused:
        assert why in resume.refused(Method.CHAT, message)
    assert resume.refused(Method.CHAT, asked(tools=[lm.Tool(name="f")])) == ""
    assert resume.refused(Method.EMBED, None)


def test_exactness_is_promised_where_equal_machines_compute_equal_numbers() -> None:
    greedy = asked(sampling=lm.Sampling(temperature=0, seed=7))
    done = said(1, 2, 3)
    assert resume.exact(greedy, done, ORIGIN, replace(ORIGIN, id="b"))
    for other in (
        replace(ORIGIN, engine_version="2"),
        replace(ORIGIN, dtype="float16"),
        replace(ORIGIN, hardware=Hardware(device="H20-96G")),
        replace(ORIGIN, hardware=Hardware(tp=2)),
    ):
        assert not resume.exact(greedy, done, ORIGIN, other)
        assert resume.alike(ORIGIN, strict=False).fits(other), "it may go on all the same"
    for sampling in (
        lm.Sampling(seed=7),
        lm.Sampling(seed=7, temperature=0.8),
        lm.Sampling(temperature=0, presence_penalty=0.5),
        lm.Sampling(temperature=0, frequency_penalty=-0.5),
    ):
        assert not resume.exact(asked(sampling=sampling), done, ORIGIN, ORIGIN)
    assert resume.exact(asked(sampling=lm.Sampling(temperature=0.8)), done, ORIGIN, ORIGIN), "a sample as good as any"
    assert not resume.exact(greedy, said(1, tool_calls=[lm.ToolCallDelta(name="f")]), ORIGIN, ORIGIN)


@pytest.mark.parametrize("field", ["weights_version", "tokenizer_digest", "template_digest", "model"])
def test_only_equal_weights_tokenizer_and_template_may_go_on(field: str) -> None:
    assert not resume.alike(ORIGIN, strict=False).fits(replace(ORIGIN, **{field: "other"}))


def test_unknown_weights_are_not_equal_weights() -> None:
    assert resume.refused_now(request(), ORIGIN, said(1)) == ""
    assert "weights_version" in resume.refused_now(request(), replace(ORIGIN, weights_version=""), said(1))
    assert "ids" in resume.refused_now(request(), ORIGIN, said())
    strict = asked(tools=[lm.Tool(name="f", strict=True)])
    assert resume.refused_now(strict, ORIGIN, said(1)) == ""
    assert "grammar" in resume.refused_now(strict, ORIGIN, said(1, tool_calls=[lm.ToolCallDelta(name="f")]))


def test_adopted_servers_continue_text_and_nothing_else() -> None:
    adopted = replace(ORIGIN, engine="openai-http:vllm", weights_version="", tokenizer_digest="")
    transcript = Transcript()
    transcript.keep_text = True
    assert "text" in resume.refused_now(request(), adopted, transcript)
    transcript.take(lm.Delta(content="Hello"))
    assert resume.refused_now(request(), adopted, transcript) == "" and transcript.resume().text == "Hello"
    assert not resume.exact(request(), transcript, adopted, adopted)
    assert not resume.alike(adopted, strict=False).fits(replace(adopted, engine="openai-http:sglang"))
    transcript.take(lm.Delta(reasoning="hm"))
    assert "reasoning" in resume.refused_now(request(), adopted, transcript)


def test_routing_sees_a_longer_prompt_and_a_shorter_answer() -> None:
    base = Facts("llm", "alias", prompt_bytes=400, max_tokens=50, since=1.0, chain=(1, 2), chain_share=0.2)
    made = resume.facts(base, ORIGIN, said(*range(25)), 60.0, strict=False)
    assert (made.model, made.prompt_tokens, made.counted, made.max_tokens) == ("m", 125, True, 25)
    assert made.since == 60.0 and made.priority > 100 and made.degrade is False and "resume" in made.features
    assert made.chain_share == pytest.approx(0.16)


# -- the forwarder against instances that end as told ------------------------------------------------------------------


Ending = Callable[[FakeInstance, Any], Awaitable[None]]


def speaks(upto: int, ending: Ending | None = None, *, finish_first: bool = False) -> Any:
    """Says TOKENS words, from where it is told to go on; at `upto` it ends as told."""

    async def chat(self: FakeInstance, request: lm.ChatRequest, context: Any) -> None:
        await self.begin(context)
        first = len(request.relay.resume.token_ids)
        assert list(request.relay.resume.token_ids) == list(range(first))
        for number in range(first, TOKENS):
            if number == upto and ending is not None and not first:
                await ending(self, context)
                return
            event = lm.ChatResponse(deltas=[lm.Delta(token_ids=[number], content=f" w{number}")])
            if number == first:
                told = request.relay.resume.response_id or f"from-{self.endpoint.id}"
                event.started.CopyFrom(lm.Started(id=told, prompt_tokens=5, cached_tokens=4 - len(self.endpoint.id)))
            if number == TOKENS - 1:
                event.deltas[0].finish = lm.FINISH_LENGTH
                if finish_first and not first:
                    await context.write(event)
                    await abort(context, MeshError(Reason.ENGINE_FAILED, "gone after its last word"))
                event.usage.CopyFrom(Usage(prompt_tokens=5, completion_tokens=TOKENS, cached_tokens=5))
            await context.write(event)

    return chat


async def breaks(self: FakeInstance, context: Any) -> None:
    await abort(context, MeshError(Reason.ENGINE_FAILED, "the engine died"))


async def drains(self: FakeInstance, context: Any) -> None:
    await abort(context, MeshError(Reason.DRAINING, "time is over"))


async def ends(self: FakeInstance, context: Any) -> None:
    """Well, by its status, and too early."""


async def listen(up: Upstream, asked: lm.ChatRequest, **call: Any) -> tuple[list[Any], Any]:
    events = []
    async with up.forwarder.open(Method.CHAT, asked, Call(REQUEST_ID, **call)) as reply:
        async for event in reply:
            assert event.message == lm.ChatResponse.FromString(event.raw)
            events.append(event.message)
        return events, reply.identity


def like(*instances: FakeInstance) -> None:
    for instance in instances:
        instance.endpoint = replace(instance.endpoint, features=frozenset({"resume", "regex"}), **ALIKE)


@pytest.mark.parametrize("ending", [breaks, drains, ends])
@pytest.mark.parametrize("collected", [False, True])
async def test_every_way_to_lose_a_stream_is_resumed(ending: Ending, collected: bool) -> None:
    async with fake_instance("a", speaks(3, ending)) as a, fake_instance("b", speaks(3, ending)) as b:
        like(a, b)
        async with upstream(a, b) as up:
            events, identity = await listen(up, request(), collected=collected)
            assert [id for e in events for d in e.deltas for id in d.token_ids] == list(range(TOKENS))
            assert [e.HasField("started") for e in events] == [True] + [False] * (len(events) - 1)
            assert (identity.attempts, identity.resumes, identity.exact) == (2, 1, True)
            usage = events[-1].usage
            assert (usage.completion_tokens, usage.cached_tokens) == (TOKENS, events[0].started.cached_tokens)
            assert len(a.requests) == len(b.requests) == 1
            resumed = next(r for r in (a.requests[0], b.requests[0]) if r.relay.HasField("resume"))
            assert resumed.relay.resume.response_id == events[0].started.id and resumed.relay.attempt == 2
            assert up.nothing_left()
            text = up.carrier._observe.exposition()[0].decode()
            assert 'infermesh_gateway_resumes_total{exact="true",reason="' in text
            assert 'infermesh_gateway_tokens_total{model="m",type="completion"} 8.0' in text, "counted once"


async def test_only_the_usage_was_lost_and_nobody_is_asked_for_it() -> None:
    async with fake_instance("a", speaks(99, finish_first=True)) as a:
        like(a)
        async with upstream(a) as up:
            events, identity = await listen(up, request())
            assert [bool(d.finish) for e in events for d in e.deltas] == [False] * (TOKENS - 1) + [True]
            assert events[-1].usage == Usage(prompt_tokens=5, completion_tokens=TOKENS, cached_tokens=3)
            assert identity.attempts == 1 and up.nothing_left()


async def test_what_cannot_go_on_says_how_far_it_got_and_why() -> None:
    async with fake_instance("a", speaks(3, breaks)) as a, fake_instance("b", speaks(3, breaks)) as b:
        like(a, b)
        b.endpoint = replace(b.endpoint, weights_version="w2")
        async with upstream(a, b) as up:
            with pytest.raises(MeshError, match=r"lost after 3 tokens: the engine died.*same weights") as caught:
                await listen(up, request())
            assert caught.value.reason is Reason.STREAM_LOST and up.nothing_left()
            with pytest.raises(MeshError, match=r"lost after 3 tokens: the engine died; .*a grammar is in progress"):
                await listen(up, asked(constraint=lm.Constraint(regex=".*")))


async def test_a_whole_answer_that_would_differ_begins_anew() -> None:
    """Nothing was sent: a seeded sample is made again rather than continued with other random numbers."""
    async with fake_instance("a", speaks(3, breaks)) as a, fake_instance("b") as b:
        like(a, b)
        async with upstream(a, b) as up:
            for _ in range(40):  # until the one that breaks was asked: they are alike, and chance decides
                _, identity = await listen(up, asked(sampling=lm.Sampling(seed=1, temperature=0.8)), collected=True)
                if identity.attempts == 2:
                    break
            assert (identity.instance_id, identity.attempts, identity.resumes) == ("b", 2, 0)
            assert not b.requests[-1].relay.HasField("resume") and up.nothing_left()


@pytest.mark.parametrize("collected", [False, True])
async def test_a_query_that_kills_after_a_token_takes_no_fleet(collected: bool) -> None:
    async def dies(self: FakeInstance, request: lm.ChatRequest, context: Any) -> None:
        await self.begin(context)
        event = lm.ChatResponse(deltas=[lm.Delta(token_ids=[len(request.relay.resume.token_ids)], content="w")])
        event.started.id = "x"
        await context.write(event)
        await abort(context, MeshError(Reason.INSTANCE_LOST, "the process died"))

    async with AsyncExitStack() as stack:
        fleet = [await stack.enter_async_context(fake_instance(id, dies)) for id in "abcdef"]
        like(*fleet)
        up = await stack.enter_async_context(upstream(*fleet))
        with pytest.raises(MeshError) as caught:
            await listen(up, request(), collected=collected)
        assert caught.value.reason is (Reason.INSTANCE_LOST if collected else Reason.STREAM_LOST)
        assert sum(len(instance.requests) for instance in fleet) == 4 and up.nothing_left()


async def test_a_query_of_death_takes_two_engines_and_no_more() -> None:
    async def dies(self: FakeInstance, request: lm.ChatRequest, context: Any) -> None:
        await self.begin(context)
        first = len(request.relay.resume.token_ids)
        if not first:
            event = lm.ChatResponse(deltas=[lm.Delta(token_ids=[0], content="w")])
            event.started.id = "x"
            await context.write(event)
        await abort(context, MeshError(Reason.ENGINE_FAILED, "the engine died"))

    async with fake_instance("a", dies) as a, fake_instance("b", dies) as b, fake_instance("c", dies) as c:
        like(a, b, c)
        async with upstream(a, b, c) as up:
            with pytest.raises(MeshError, match="lost after 1 tokens: the engine died"):
                await listen(up, request())
            assert sum(len(x.requests) for x in (a, b, c)) == 2 and up.nothing_left()
