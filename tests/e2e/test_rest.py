"""The REST front over a real socket: OpenAI's shapes, errors, streams, and callers who misbehave."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import struct
import time

import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm
from services.chassis.keys import Key, Keys
from services.gateway.upstream.calls import Method
from tests.e2e.rest_server import ask, connection, raw_request, serve_rest, sse_events
from tests.e2e.scripted_forward import ScriptedForward
from tests.kit.mesh import until

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


# Shapes


async def test_chat_reply_and_headers():
    async with serve_rest() as server:
        answer = await ask(server, "/v1/chat/completions", CHAT | {"user": "u", "store": False}, x_request_id="my-id")
        assert answer.status == 200
        assert answer.json == {
            "id": "id-1",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "chat-served",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": " w0 w1 w2 w3 w4", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "length",
                }
            ],
            "usage": {
                "prompt_tokens": 7,
                "completion_tokens": 5,
                "total_tokens": 12,
                "prompt_tokens_details": {"cached_tokens": 3},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        }
        headers = answer.headers
        assert headers["x-infermesh-instance-id"] == "llm-1"
        assert headers["x-infermesh-model-id"] == "chat-served"
        assert headers["x-infermesh-attempts"] == "1"
        assert headers["x-request-id"] == "my-id"
        assert headers["x-infermesh-ignored"] == "store, user"
        assert headers["openai-processing-ms"].isdigit()
        _, request, call = server.forward.calls[0]
        assert request.delivery.min_interval_ms == 250
        assert call.request_id == "my-id"


async def test_chat_stream_begins_with_the_role_and_ends_with_usage_and_done():
    async with serve_rest() as server:
        body = CHAT | {"stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 3}
        answer = await ask(server, "/v1/chat/completions", body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-infermesh-instance-id"] == "llm-1"
        *chunks, usage, done = sse_events(answer)
        assert done == "[DONE]"
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
            {"role": "assistant", "content": ""},
            {"content": " w0"},
            {"content": " w1"},
            {"content": " w2"},
        ]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
        assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
        assert usage["choices"] == []
        assert usage["usage"]["total_tokens"] == 10
        assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
        assert server.forward.calls[0][1].delivery.min_interval_ms == 0


async def test_chat_stream_without_usage_has_none():
    async with serve_rest() as server:
        chunks = sse_events(await ask(server, "/v1/chat/completions", CHAT | {"stream": True}))
        assert chunks[-1] == "[DONE]"
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks[:-1])


async def test_several_choices_each_get_a_role_and_their_own_text():
    async with serve_rest(ScriptedForward(tokens=2)) as server:
        whole = (await ask(server, "/v1/chat/completions", CHAT | {"n": 3})).json
        assert [choice["message"]["content"] for choice in whole["choices"]] == [" w0 w1"] * 3
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
        chunks = sse_events(await ask(server, "/v1/chat/completions", CHAT | {"n": 3, "stream": True}))[:-1]
        for index in range(3):
            mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert mine[0]["delta"]["role"] == "assistant"
            assert "".join(one["delta"].get("content", "") for one in mine) == " w0 w1"


async def test_tool_calls_reasoning_and_logprobs():
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    async with serve_rest(ScriptedForward(tokens=3, tool_call=True, reasoning=False)) as server:
        body = CHAT | {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        choice = (await ask(server, "/v1/chat/completions", body)).json["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"] == [
            {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
        ]
        chunks = sse_events(await ask(server, "/v1/chat/completions", body | {"stream": True}))[:-1]
        calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
        assert calls[0] == {
            "index": 0,
            "id": "call-1",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a":'},
        }
        assert "".join(call["function"]["arguments"] for call in calls) == '{"a":1}'
        sent = server.forward.calls[0][1]
        assert sent.tool_choice.mode == lm.ToolChoice.MODE_REQUIRED
        assert sent.tool_choice.HasField("parallel") and not sent.tool_choice.parallel
    async with serve_rest(ScriptedForward(tokens=2, reasoning=True)) as server:
        body = CHAT | {"logprobs": True, "top_logprobs": 2}
        choice = (await ask(server, "/v1/chat/completions", body)).json["choices"][0]
        assert choice["message"]["reasoning_content"] == "hm"
        entry = choice["logprobs"]["content"][1]
        assert entry["token"] == " w1" and entry["bytes"] == [32, 119, 49] and entry["logprob"] == -0.25
        assert [one["logprob"] for one in entry["top_logprobs"]] == [-0.25, -9999.0]
        hidden = (await ask(server, "/v1/chat/completions", body | {"include_reasoning": False})).json["choices"][0]
        assert "reasoning_content" not in hidden["message"]


@pytest.mark.parametrize(("prompt", "count"), [("a b c", 1), (["a", "b", "c"], 3), ([1, 2, 3], 1), ([[1, 2], [3]], 2)])
async def test_completions_fan_out(prompt, count):
    async with serve_rest(ScriptedForward(tokens=2)) as server:
        body = {"model": "chat", "prompt": prompt, "n": 2, "max_tokens": 9}
        whole = (await ask(server, "/v1/completions", body)).json
        assert whole["object"] == "text_completion"
        assert [choice["index"] for choice in whole["choices"]] == list(range(2 * count))
        assert all(choice["text"] == " w0 w1" and choice["finish_reason"] == "length" for choice in whole["choices"])
        assert whole["usage"]["prompt_tokens"] == 7 * count
        assert whole["usage"]["completion_tokens"] == 4 * count
        assert len({call.request_id for _, _, call in server.forward.calls}) == count
        streamed = await ask(
            server, "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
        )
        *chunks, usage, done = sse_events(streamed)
        texts: dict[int, str] = {}
        for chunk in chunks:
            choice = chunk["choices"][0]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert texts == {index: " w0 w1" for index in range(2 * count)}
        assert usage["usage"]["completion_tokens"] == 4 * count and done == "[DONE]"


async def test_completions_default_to_sixteen_tokens_and_echo_with_logprobs():
    async with serve_rest(ScriptedForward(tokens=1)) as server:
        body = {"model": "chat", "prompt": "a b c", "echo": True, "logprobs": 1}
        choice = (await ask(server, "/v1/completions", body)).json["choices"][0]
        assert server.forward.calls[0][1].sampling.max_tokens == 16
        assert choice["text"] == "a b c w0"
        assert choice["logprobs"] == {
            "tokens": ["a", " b", " c", " w0"],
            "token_logprobs": [None, -0.5, -0.5, -0.25],
            "top_logprobs": [None, {" b": -0.5}, {" c": -0.5}, {" t0": -0.25}],
            "text_offset": [0, 1, 3, 5],
        }


async def test_embeddings_float_and_base64():
    async with serve_rest() as server:
        answer = await ask(server, "/v1/embeddings", {"model": "embed", "input": ["a", "b"]})
        body = answer.json
        assert body["object"] == "list" and body["model"] == "embed-served"
        assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
        assert [entry["index"] for entry in body["data"]] == [0, 1]
        assert [struct.pack("<f", x) for x in body["data"][1]["embedding"]] == [
            struct.pack("<f", 1 + at / 7) for at in range(4)
        ]
        coded = (
            await ask(server, "/v1/embeddings", {"model": "embed", "input": "a", "encoding_format": "base64"})
        ).json
        raw = base64.b64decode(coded["data"][0]["embedding"])
        assert list(struct.unpack("<4f", raw)) == pytest.approx([0, 1 / 7, 2 / 7, 3 / 7])
        for ids in ([1, 2], [[1, 2], [3]]):
            assert (await ask(server, "/v1/embeddings", {"model": "embed", "input": ids})).status == 200
        assert [len(request.token_ids) for _, request, _ in server.forward.calls[2:]] == [1, 2]


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_a_large_embedding_reply_never_holds_the_loop(form):
    async with serve_rest(ScriptedForward(dimensions=1024)) as server:
        longest = 0.0
        beating = True

        async def beat() -> None:
            nonlocal longest
            while beating:
                begun = time.thread_time()  # not the wall's: others share these cores
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - begun)

        body = {"model": "embed", "input": ["x"] * 2048, "encoding_format": form}
        async with connection(server) as client:
            await client.send(raw_request("/v1/embeddings", body))
            status, _ = await client.head()  # the fake's own work is over now
            assert status == 200
            beater = asyncio.create_task(beat())
            parts = []
            while part := await client.chunk():
                parts.append(part)
            beating = False
            await beater
        data = json.loads(b"".join(parts))["data"]
        assert len(data) == 2048
        if form == "float":
            assert len(data[2047]["embedding"]) == 1024
        # Slack for the reading side, which shares this loop; the writing side's piece is 0.3 ms.
        assert longest < 0.03, f"the loop was held for {longest * 1000:.1f} ms"


async def test_rerank_in_both_shapes_and_score():
    docs = ["a", {"text": "aaaa"}, "aa"]
    async with serve_rest() as server:
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
            body = {"model": "rank", "query": "q", "documents": docs, "top_n": 2, "return_documents": True}
            answer = (await ask(server, path, body)).json
            assert [result["index"] for result in answer["results"]] == [1, 2]
            assert answer["results"][0]["document"] == {"text": "aaaa"}
            assert answer["results"][0]["relevance_score"] == pytest.approx(0.04)
            assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
            assert answer["meta"]["billed_units"]["search_units"] == 1
        one = (await ask(server, "/v1/score", {"model": "rank", "text_1": "q", "text_2": ["a", "aaa"]})).json
        assert [entry["score"] for entry in one["data"]] == pytest.approx([0.01, 0.03])
        assert one["usage"]["prompt_tokens"] == 9
        pairs = {"model": "rank", "queries": ["q", "r"], "documents": ["aa", "aaaaa"]}
        two = (await ask(server, "/v1/score", pairs)).json
        assert [entry["score"] for entry in two["data"]] == pytest.approx([0.02, 0.05])
        assert two["usage"]["prompt_tokens"] == 18


async def test_models_tokens_health_and_the_rest():
    async with serve_rest() as server:
        listed = (await ask(server, "/v1/models", method="GET")).json
        assert [entry["id"] for entry in listed["data"]] == ["chat", "gpt", "embed", "org/rank"]
        assert listed["data"][0] == {
            "id": "chat",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "infermesh",
            "kind": "llm",
            "max_model_len": 2048,
        }
        assert (await ask(server, "/v1/models/org/rank", method="GET")).json["id"] == "org/rank"
        assert (await ask(server, "/v1/models/gpt", method="GET")).json["root"] == "chat"
        missing = await ask(server, "/v1/models/nope", method="GET")
        assert missing.status == 404 and missing.error["code"] == "model_not_found"
        words = (await ask(server, "/tokenize", {"model": "chat", "prompt": "hi", "return_token_strs": True})).json
        assert words == {"count": 2, "max_model_len": 2048, "tokens": [5, 6], "token_strs": ["a", "b"]}
        assert (await ask(server, "/tokenize", {"model": "chat", "messages": CHAT["messages"]})).status == 200
        assert (await ask(server, "/detokenize", {"model": "chat", "tokens": [1, 2]})).json == {"prompt": "1 2"}
        for path in ("/healthz", "/livez", "/readyz", "/version"):
            assert (await ask(server, path, method="GET")).status == 200
        metrics = await ask(server, "/metrics", method="GET")
        assert metrics.body == b"infermesh_up 1\n" and metrics.headers["content-type"].startswith("text/plain")
        console = await ask(server, "/console", method="GET")
        assert console.status == 308 and console.headers["location"] == "/console/"
        assert (await ask(server, "/v1/nonsense", {})).status == 404
        wrong = await ask(server, "/v1/chat/completions", method="GET")
        assert wrong.status == 404 and "answers to POST" in wrong.error["message"]
        server.draining[0] = True
        ready = await ask(server, "/readyz", method="GET")
        assert ready.status == 503 and ready.error["code"] == "draining"
        assert ready.headers["connection"] == "close"
        assert (await ask(server, "/healthz", method="GET")).status == 200


async def test_head_and_small_packets():
    async with serve_rest() as server:
        async with connection(server) as client:
            for _ in range(2):
                await client.send(raw_request("/healthz", None, method="HEAD"))
                status, headers = await asyncio.wait_for(client.head(), 20)
                assert status == 200 and headers["content-length"] == "15"
            (accepted,) = server.server.server_state.connections
            held_back = accepted.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert held_back, "Nagle's algorithm would hold tokens back for 40 ms"


async def test_headers_become_hints_deadline_and_trace():
    async with serve_rest() as server:
        trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
        now = asyncio.get_running_loop().time()
        await ask(
            server,
            "/v1/chat/completions",
            CHAT | {"prompt_cache_key": "s1"},
            x_infermesh_priority="-7",
            x_infermesh_allow_degrade="true",
            x_infermesh_document_id="doc",
            x_infermesh_timeout_ms="2500",
            traceparent=trace,
            tracestate="k=v",
        )
        _, request, call = server.forward.calls[0]
        assert request.hints == inf.Hints(document_id="doc", session_id="s1", priority=-7, degrade=inf.DEGRADE_ALLOW)
        assert call.trace == {"traceparent": trace, "tracestate": "k=v"}
        assert 2.5 <= call.deadline - now < 12.5
        await ask(server, "/v1/chat/completions", CHAT, x_stainless_timeout="NOT_GIVEN", traceparent="junk")
        assert server.forward.calls[1][2].deadline is None and not server.forward.calls[1][2].trace
        for header, value in (("priority", "high"), ("priority", "²"), ("timeout-ms", "²"), ("timeout-ms", "0")):
            bad = await ask(server, "/v1/chat/completions", CHAT, **{f"x-infermesh-{header}": value})
            assert bad.status == 400 and bad.error["param"] == f"x-infermesh-{header}", value


# Errors


async def test_errors_before_the_first_token_are_plain_statuses():
    lost = MeshError(Reason.INSTANCE_LOST, "gone")
    full = MeshError(Reason.QUEUE_FULL, "full", retry_after_s=1.2)
    for stream in (False, True):
        async with serve_rest(ScriptedForward(fail_first=lost)) as server:
            answer = await ask(server, "/v1/chat/completions", CHAT | {"stream": stream})
            assert answer.status == 503
            assert answer.error == {
                "message": "gone",
                "type": "service_unavailable_error",
                "param": None,
                "code": "instance_lost",
            }
            assert answer.headers["x-should-retry"] == "false"
            assert server.watcher.refusals == []  # the forwarder counts what was opened
            server.forward.fail_first = full
            answer = await ask(server, "/v1/chat/completions", CHAT | {"stream": stream})
            assert answer.status == 429
            assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1200")
            assert "x-should-retry" not in answer.headers


async def test_an_error_in_a_stream_is_an_event_without_done():
    async with serve_rest(ScriptedForward(fail_after=2)) as server:
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", {"model": "chat", "prompt": "a"}),
            ("/v1/completions", {"model": "chat", "prompt": ["a", "b"]}),
        ):
            events = sse_events(await ask(server, path, body | {"stream": True}))
            assert events[-1]["error"]["code"] == "stream_lost"
            assert "[DONE]" not in events
        plain = await ask(server, "/v1/chat/completions", CHAT)
        assert plain.status == 503
        await until(lambda: server.forward.running == 0)


async def test_keys_decide_who_may_ask_what():
    digest = hashlib.sha256(b"foo").hexdigest()
    keys = Keys((Key(sha256=digest, tenant="acme", models=("chat",)),))
    async with serve_rest(keys=keys) as server:
        for header in (None, "Bearer wrong", "Basic foo", "Bearer "):
            answer = await ask(server, "/v1/chat/completions", CHAT, authorization=header)
            assert answer.status == 401 and answer.error["type"] == "authentication_error"
        assert (await ask(server, "/v1/models", method="GET")).status == 401
        assert (await ask(server, "/metrics", method="GET")).status == 401
        assert (await ask(server, "/healthz", method="GET")).status == 200
        assert server.watcher.refusals[0][1].reason is Reason.UNAUTHENTICATED
        good = {"authorization": "Bearer foo"}
        assert (await ask(server, "/v1/chat/completions", CHAT, **good)).status == 200
        assert server.forward.calls[0][2].caller.tenant == "acme"
        assert (await ask(server, "/v1/embeddings", {"model": "embed", "input": "a"}, **good)).status == 403
        listed = (await ask(server, "/v1/models", method="GET", **good)).json["data"]
        assert [entry["id"] for entry in listed] == ["chat"], "not its alias either, which the key may not ask for"
        assert (await ask(server, "/v1/models/chat", method="GET", **good)).status == 200
        assert (await ask(server, "/v1/models/gpt", method="GET", **good)).status == 404


async def test_every_method_is_reached_with_its_own_message():
    async with serve_rest() as server:
        await ask(server, "/v1/completions", {"model": "chat", "prompt": "a"})
        await ask(server, "/v1/embeddings", {"model": "embed", "input": "a"})
        await ask(server, "/tokenize", {"model": "chat", "prompt": "a"})
        assert [method for method, _, _ in server.forward.calls] == [Method.COMPLETE, Method.EMBED, Method.TOKENIZE]
        assert all(isinstance(request, method.request) for method, request, _ in server.forward.calls)
