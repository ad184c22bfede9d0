"""Adopting OpenAI-speaking servers: a fake one over real HTTP that is honest about what such servers send."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Relay, TokenIds
from services.llm.engine import Event
from services.llm.engines import openai_http
from services.llm.engines.openai_http import OpenAiHttpEngine
from services.llm.engines.openai_reply import SseLines
from services.llm.settings import LlmSettings
from tests.kit.mesh import running_mesh, until
from tests.kit.openai_server import USAGE, Fake, adopted, chat, chunk, collect, text_of


async def test_it_is_found_out_and_a_chat_streams_through() -> None:
    fake = Fake()
    fake.says(chunk("", role="assistant"), chunk("Guten "), chunk("Tag"), chunk("", "stop"), USAGE)
    async with adopted(fake) as (engine, info):
        assert (info.engine, info.engine_version, info.capacity.context_max) == ("openai-http:vllm", "0.32.1", 4096)
        assert {"tools", "regex", "n", "token_ids"} <= info.features
        events = await collect(engine.chat(chat(sampling=lm.Sampling(max_tokens=9, temperature=0.7))))
        assert [d.content for e in events for d in e.deltas] == ["Guten ", "Tag", ""]
        assert events[0].prompt is not None
        assert events[-2].deltas[0].finish == lm.FINISH_STOP
        assert [event.usage is not None for event in events] == [False, False, False, True]
        usage = events[-1].usage
        assert usage is not None and (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (7, 2, 5)
        sent = fake.asked[0]
        assert (sent["max_tokens"], sent["temperature"], sent["stream"]) == (9, 0.7, True)
        assert sent["stream_options"]["include_usage"] and sent["messages"] == [{"role": "user", "content": "hi"}]
        assert engine.load().running == 0


async def test_llama_cpp_as_it_answers() -> None:
    """As `make gguf` saw it: slots in /props, log-probabilities of a completion in a chat's form, too long a prompt."""
    entry = {"token": " layer", "bytes": [32, 108, 97, 121, 101, 114], "logprob": -2.4, "id": 264}
    top = [{**entry}, {"token": "5", "bytes": [53], "logprob": -2.6, "id": 56}]
    logprobs = {"content": [{**entry, "top_logprobs": top}]}
    fake = Fake(owned_by="llamacpp", max_model_len=None)
    fake.says(
        {"choices": [{"text": " layer", "index": 0, "logprobs": logprobs, "finish_reason": None}]},
        {"choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}], "usage": USAGE["usage"]},
    )
    async with adopted(fake) as (engine, info):
        assert (info.engine, info.engine_version) == ("openai-http:llama.cpp", "b1-0c1e570")
        assert (info.capacity.context_max, info.capacity.max_running) == (1024, 2)
        request = lm.CompleteRequest(model="m", text="the", sampling=lm.Sampling(max_tokens=1, logprobs=2))
        events = await collect(engine.complete(request))
        (said,) = [logprob for event in events for delta in event.deltas for logprob in delta.logprobs]
        assert (said.token, round(said.logprob, 3)) == (" layer", -2.4)
        assert [(one.token, one.rank) for one in said.top] == [(" layer", 1), ("5", 2)]
        fake.status = 400
        message = "request (1804 tokens) exceeds the available context size (1024 tokens), try increasing it"
        fake.pieces = [
            json.dumps({"error": {"code": 400, "message": message, "type": "exceed_context_size_error"}}).encode()
        ]
        with pytest.raises(MeshError) as caught:
            await collect(engine.complete(request))
        assert caught.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    async with adopted(Fake(owned_by="llamacpp"), max_running=1) as (_, info):
        assert info.capacity.max_running == 1, "the operator's word"


async def test_bytes_may_be_cut_anywhere_and_pings_come_between() -> None:
    text = "naïve 知识库 🙂 answer"
    for size in (1, 2, 3, 7):
        fake = Fake()
        fake.says(": ping\n\n", chunk(text), ": ping\r\n\r\n", chunk(text), chunk(None, "stop"), USAGE)
        raw = b"".join(piece for piece in fake.pieces if piece).replace(b"\n\n", b"\r\n\r\n", 3)
        fake.pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        lines = SseLines()
        assert len([p for piece in fake.pieces if piece for p in lines.feed(piece)]) == 5
        if size == 7:
            async with adopted(fake) as (engine, _):
                assert text_of(await collect(engine.chat(chat()))) == text * 2


async def test_without_usage_deltas_are_counted() -> None:
    fake = Fake(owned_by="somebody", max_model_len=None)
    fake.says(chunk("a"), chunk("b"), chunk("c", "length"))
    async with adopted(fake) as (engine, info):
        assert info.capacity.context_max == 0
        events = await collect(engine.chat(chat()))
        usage = events[-1].usage
        assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (0, 3)


async def test_tool_calls_reasoning_choices_logprobs_and_token_ids() -> None:
    fake = Fake()
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"a":1}'}}
    entry = {
        "token": "x",
        "logprob": -0.5,
        "bytes": [120],
        "top_logprobs": [{"token": "x", "logprob": -0.5, "bytes": [120]}],
    }
    with_ids = chunk("x", index=1)
    with_ids["choices"][0] |= {"token_ids": [11, 12], "logprobs": {"content": [entry]}, "stop_reason": None}
    stopped = chunk(None, "stop", index=1)
    stopped["choices"][0]["stop_reason"] = "END"
    fake.says(
        chunk(reasoning_content="hm"), chunk(reasoning="so"), chunk(tool_calls=[call]), chunk(tool_calls=[more]),
        with_ids, stopped, chunk(None, "tool_calls"), USAGE,
    )  # fmt: skip
    tool = lm.Tool(name="f", parameters_json='{"type": "object"}', strict=True)
    async with adopted(fake) as (engine, _):
        request = chat(tools=[tool], sampling=lm.Sampling(n=2, logprobs=1), relay=Relay(cache_salt=b"\x01"))
        request.tool_choice.mode = lm.ToolChoice.MODE_REQUIRED
        deltas = [delta for event in await collect(engine.chat(request)) for delta in event.deltas]
    assert "".join(delta.reasoning for delta in deltas) == "hmso"
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert [(c.index, c.id, c.name, c.arguments_json) for c in calls] == [(0, "c1", "f", ""), (0, "", "", '{"a":1}')]
    ids = next(delta for delta in deltas if delta.token_ids)
    assert (ids.choice, list(ids.token_ids), ids.logprobs[0].token, ids.logprobs[0].top[0].rank) == (
        1,
        [11, 12],
        "x",
        1,
    )
    assert [(d.choice, d.finish, d.stop_text) for d in deltas if d.finish] == [
        (1, lm.FINISH_STOP, "END"),
        (0, lm.FINISH_TOOL_CALLS, ""),
    ]
    sent = fake.asked[0]
    assert (sent["n"], sent["logprobs"], sent["top_logprobs"], sent["tool_choice"]) == (2, True, 1, "required")
    assert sent["tools"][0]["function"] == {"name": "f", "parameters": {"type": "object"}, "strict": True}
    assert (sent["cache_salt"], sent["return_token_ids"]) == ("01", True)


async def test_a_completion_streams_text() -> None:
    fake = Fake()
    first = {"choices": [{"index": 0, "text": "one", "finish_reason": None, "logprobs": {
        "tokens": ["one"], "token_logprobs": [-0.25], "top_logprobs": [{"two": -2.0, "one": -0.25}]}}]}  # fmt: skip
    fake.says(first, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}, USAGE)
    async with adopted(fake) as (engine, _):
        request = lm.CompleteRequest(
            model="m", token_ids=TokenIds(ids=[1, 2]), echo=True, sampling=lm.Sampling(logprobs=2)
        )
        events = await collect(engine.complete(request))
        assert text_of(events) == "one"
        assert [top.token for top in events[0].deltas[0].logprobs[0].top] == ["one", "two"]
        assert fake.asked[0]["prompt"] == [1, 2] and fake.asked[0]["echo"] is True


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (400, b'{"error": {"message": "bad top_p", "type": "x", "code": 400}}', Reason.INVALID_ARGUMENT),
        (400, b'{"object": "error", "message": "maximum context length is 5"}', Reason.CONTEXT_LENGTH_EXCEEDED),
        (400, b'{"error": {"message": "no", "code": "context_length_exceeded"}}', Reason.CONTEXT_LENGTH_EXCEEDED),
        (401, b'{"error": "key"}', Reason.ENGINE_FAILED),
        (404, b'{"error": "model gone"}', Reason.ENGINE_FAILED),
        (413, b"", Reason.REQUEST_TOO_LARGE),
        (422, b'{"detail": [{"loc": ["body"]}]}', Reason.INVALID_ARGUMENT),
        (429, b'{"error": {"message": "slow down"}}', Reason.INSTANCE_FULL),
        (500, b"<html>boom</html>", Reason.ENGINE_FAILED),
        (503, b'{"error": {"message": "Loading model", "code": 503}}', Reason.INSTANCE_FULL),
    ],
)
async def test_the_servers_errors_become_ours(status: int, body: bytes, reason: Reason) -> None:
    fake = Fake()
    fake.status, fake.pieces, fake.headers = status, [body], {"Retry-After": "3"}
    async with adopted(fake) as (engine, _):
        with pytest.raises(MeshError) as caught:
            await collect(engine.chat(chat()))
        assert caught.value.reason is reason
        if reason is Reason.INSTANCE_FULL:
            assert caught.value.retry_after_s == 3
        assert engine.load().running == 0


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([chunk("a"), {"error": {"message": "EngineCore died", "code": 500}}], Reason.ENGINE_FAILED),
        ([chunk("a"), {"error": {"message": "bad grammar", "code": 400}}], Reason.INVALID_ARGUMENT),
        ([chunk("a"), "data: {not json\n\n"], Reason.ENGINE_FAILED),
        ([chunk("a"), "data: [1, 2]\n\n"], Reason.ENGINE_FAILED),
        ([chunk("a"), {"choices": [{"index": 0, "delta": {"content": 7}}]}], Reason.ENGINE_FAILED),
        ([chunk("a")], Reason.ENGINE_FAILED),
    ],
)
async def test_what_goes_wrong_after_the_first_token_is_told_after_it(chunks: list[Any], reason: Reason) -> None:
    fake = Fake()
    fake.says(*chunks)
    async with adopted(fake) as (engine, _):
        seen: list[Event] = []
        with pytest.raises(MeshError) as caught:
            async for event in engine.chat(chat()):
                seen.append(event)
        assert text_of(seen) == "a" and caught.value.reason is reason


async def test_leaving_closes_the_connection_so_that_the_server_stops() -> None:
    fake = Fake()
    fake.says(chunk("a"), done=False)
    fake.pieces.append(None)
    async with adopted(fake) as (engine, _):
        events = engine.chat(chat())
        await anext(events)
        assert (engine.load().running, fake.open) == (1, 1)
        await events.aclose()  # type: ignore[attr-defined]
        assert engine.load().running == 0, "at once, not when somebody tidies up"
        await asyncio.wait_for(fake.gone.wait(), 20)
        fake.gone.clear()
        waiting = asyncio.create_task(collect(engine.chat(chat())))
        await until(lambda: fake.open == 1, 20)
        waiting.cancel()
        await asyncio.wait_for(fake.gone.wait(), 20)
        assert engine.load().running == 0


async def test_a_server_that_goes_silent_or_away_is_lost() -> None:
    fake = Fake()
    fake.pieces = [None]
    async with adopted(fake, openai_http={"idle_timeout_s": 0.2}) as (engine, _):
        with pytest.raises(MeshError) as caught:
            await collect(engine.chat(chat()))
        assert caught.value.reason is Reason.INSTANCE_LOST
        engine._base = "http://127.0.0.1:1"
        with pytest.raises(MeshError) as caught:
            await collect(engine.chat(chat()))
        assert caught.value.reason is Reason.INSTANCE_LOST and "cannot be reached" in caught.value.message


async def test_it_is_dead_when_nobody_listens_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "WATCH_S", 0.02)
    monkeypatch.setattr(openai_http, "GONE_AFTER_S", 1.0)
    async with adopted(Fake()) as (engine, _):
        died = asyncio.create_task(engine.died())
        await asyncio.sleep(1.5)
        assert not died.done()
        engine._base = "http://127.0.0.1:1"
        assert "nobody has answered" in await asyncio.wait_for(died, 20)


async def test_the_key_is_read_from_its_file_and_sent(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    fake = Fake()
    async with adopted(fake, openai_http={"api_key_file": tmp_path / "key"}):
        assert fake.authorization == ["Bearer s3cret"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"source": "http://127.0.0.1:1", "openai_http": {"probe_timeout_s": 0.1}}, "does not answer within"),
        ({"openai_http": {"upstream_model": "other"}}, "serves m"),
        ({"openai_http": {"api_key_file": "missing"}}, "api-key-file"),
    ],
)
async def test_what_cannot_be_adopted_says_why(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(MeshError, match=match) as caught:
        async with adopted(Fake(), **settings):
            pass
    assert caught.value.reason is Reason.FAILED_PRECONDITION


async def test_a_source_that_is_no_url_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="not a URL"):
        OpenAiHttpEngine(LlmSettings(engine="openai-http", model="m", source="localhost:80"))


async def test_a_smaller_range_is_kept_where_the_server_counts() -> None:
    fake = Fake()
    fake.says(chunk("a", "stop"), USAGE)
    async with adopted(fake, context=(0, 20)) as (engine, info):
        assert info.capacity.context_max == 20
        assert text_of(await collect(engine.chat(chat("few words")))) == "a"
        with pytest.raises(MeshError, match="30 tokens") as caught:
            await collect(engine.chat(chat("w " * 30)))
        assert caught.value.reason is Reason.OUT_OF_RANGE
        assert len(fake.asked) == 1


async def test_tokenize_where_there_is_one() -> None:
    async with adopted(Fake()) as (engine, _):
        reply = await engine.tokenize(lm.TokenizeRequest(text="a b c"))
        assert (len(reply.token_ids), reply.max_context) == (3, 4096)
        assert (await engine.detokenize(lm.DetokenizeRequest(token_ids=[1]))).text == "back"
    async with adopted(Fake(owned_by="library")) as (engine, _):
        for call in (engine.tokenize(lm.TokenizeRequest(text="a")), engine.detokenize(lm.DetokenizeRequest())):
            with pytest.raises(MeshError) as caught:
                await call
            assert caught.value.reason is Reason.UNIMPLEMENTED


async def test_our_own_gateway_can_be_adopted_too(tmp_path: Path) -> None:
    """A caller's gRPC -> gateway -> openai-http instance -> the same gateway's REST -> scripted instance."""
    async with running_mesh(tmp_path, {"scripted": ()}, http="127.0.0.1:0") as mesh:
        url = mesh.http if "://" in mesh.http else f"http://{mesh.http}"
        flags = ("--engine", "openai-http", "--source", url, "--upstream-model", "chat")
        await mesh.start("adopted", *flags, model="second")
        await mesh.healthy("adopted")
        stub = await mesh.direct("adopted")
        for target in (mesh.llm, stub):
            request = chat("one two", sampling=lm.Sampling(max_tokens=12, stop=["w9"], min_tokens=3, logprobs=1))
            request.model = "second"
            replies = [reply async for reply in target.Chat(request, timeout=20)]
            assert replies[0].started.model == "second" and replies[0].started.instance_id == "adopted"
            assert "".join(d.content for r in replies for d in r.deltas) == " w0 w1 w2 w3 w4 w5 w6 w7 w8 "
            last = [delta for reply in replies for delta in reply.deltas][-1]
            assert (last.finish, last.stop_text) == (lm.FINISH_STOP, "w9")
            assert (replies[-1].usage.prompt_tokens, replies[-1].usage.completion_tokens) == (4, 10)
            assert len([entry for r in replies for d in r.deltas for entry in d.logprobs]) == 10
        complete = lm.CompleteRequest(model="second", text="a b c", sampling=lm.Sampling(max_tokens=4), echo=True)
        replies = [reply async for reply in stub.Complete(complete, timeout=20)]
        assert "".join(d.content for r in replies for d in r.deltas) == "a b c w0 w1 w2 w3"
        tokens = await stub.Tokenize(lm.TokenizeRequest(model="second", text="a b c"))
        assert len(tokens.token_ids) == 3
        assert (await stub.Detokenize(lm.DetokenizeRequest(model="second", token_ids=tokens.token_ids))).text == "a b c"
