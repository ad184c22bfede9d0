"""Bad input: each a clear typed error that names the field, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.rest_server import ask, connection, raw_request, serve_rest

HI = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "chat", "messages": HI}
IMAGE = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
REGEX_AND_CHOICE = {"guided_regex": "a", "guided_choice": ["b"]}


def user(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **message}]}


def tool(name: str) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": name}}]}


# what is added to a good request, the parameter at fault
INVALID_CHAT = [
    ({"model": None}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "cat", "content": ""}]}, "messages[0].role"),
    (user(content=5), "messages[0].content"),
    (user(), "messages[0].content"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": 2**63 - 1}, "max_tokens"),
    ({"max_tokens": 10**40}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    ({"n": 16384}, "n"),
    ({"n": 0}, "n"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_k": 2**31}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"7": 101}}, "logit_bias[7]"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 5}, "logprobs"),
    (REGEX_AND_CHOICE, "guided_choice"),
    ({"guided_choice": []}, "guided_choice"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": 5}, "tool_choice"),
    (tool("a b"), "tools[0].function.name"),
    (tool("f") | {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"priority": 1000}, "priority"),
    ({"prompt_cache_key": "x" * 300}, "prompt_cache_key"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"continue_final_message": True}, "continue_final_message"),
]
UNSUPPORTED_CHAT = [
    (user(content=IMAGE), "messages[0].content[1]"),
    (user(content="x", mood="sad"), "messages[0].mood"),
    ({"frobnicate": 1}, "frobnicate"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"lora": "a"}, "lora"),
    ({"best_of": 2}, "best_of"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
]
# endpoint, body, status, code, parameter
OTHERS = [
    ("completions", {"model": "chat", "prompt": ""}, 400, "invalid_argument", "prompt"),
    ("completions", {"model": "chat"}, 400, "invalid_argument", "prompt"),
    ("completions", {"model": "chat", "prompt": []}, 400, "invalid_argument", "prompt"),
    ("completions", {"model": "chat", "prompt": [[]]}, 400, "invalid_argument", "prompt"),
    ("completions", {"model": "chat", "prompt": ["a", 1]}, 400, "invalid_argument", "prompt[1]"),
    ("completions", {"model": "chat", "prompt": [1, -1]}, 400, "invalid_argument", "prompt"),
    ("completions", {"model": "chat", "prompt": [1, True]}, 400, "invalid_argument", "prompt"),
    ("completions", {"model": "chat", "prompt": ["a"] * 1025}, 400, "invalid_argument", "prompt"),
    ("completions", {"model": "chat", "prompt": "a", "suffix": "b"}, 400, "unsupported", "suffix"),
    ("completions", {"model": "chat", "prompt": "a", "logprobs": 21}, 400, "invalid_argument", "logprobs"),
    ("embeddings", {"model": "embed", "input": []}, 400, "invalid_argument", "input"),
    ("embeddings", {"model": "embed", "input": ["a", ""]}, 400, "invalid_argument", "input[1]"),
    ("embeddings", {"model": "embed", "input": {"a": 1}}, 400, "invalid_argument", "input"),
    ("embeddings", {"model": "embed", "input": ["a"] * 2049}, 400, "invalid_argument", "input"),
    ("embeddings", {"model": "embed", "input": "", "encoding_format": 1}, 400, "invalid_argument", "encoding_format"),
    ("embeddings", {"model": "embed", "input": "a", "dimensions": -1}, 400, "invalid_argument", "dimensions"),
    ("embeddings", {"model": "chat", "input": "a"}, 404, "model_not_found", "model"),
    ("rerank", {"model": "rank", "query": "q", "documents": []}, 400, "invalid_argument", "documents"),
    ("rerank", {"model": "rank", "query": "q", "documents": ["a", 1]}, 400, "invalid_argument", "documents[1]"),
    ("rerank", {"model": "rank", "query": "", "documents": ["a"]}, 400, "invalid_argument", "query"),
    ("rerank", {"model": "rank", "query": "q", "documents": ["a"], "top_n": 0}, 400, "invalid_argument", "top_n"),
    ("rerank", {"model": "rank", "query": "q", "documents": ["a"], "rank": 1}, 400, "unsupported", "rank"),
    ("score", {"model": "rank", "text_1": ["a", "b"], "text_2": ["c"]}, 400, "invalid_argument", "text_2"),
    ("score", {"model": "rank", "text_1": "a"}, 400, "invalid_argument", "text_1"),
    ("chat/completions", CHAT | {"model": "nope"}, 404, "model_not_found", "model"),
]  # fmt: skip
OPEN = json.dumps(CHAT)[:-1].encode()
RAW = {
    "malformed": b'{"model": "chat", ',
    "empty": b"",
    "a list": b"[]",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "NaN": OPEN + b', "temperature": NaN}',
    "Infinity": OPEN + b', "temperature": -Infinity}',
    "1e400": OPEN + b', "temperature": 1e400}',
    "lone surrogate": OPEN + b', "user": "\\ud800"}',
    "not UTF-8": b'{"model": "\xff"}',
    "two documents": b"{}{}",
    "many keys": b"{" + b",".join(b'"k%d":0' % i for i in range(700_000)) + b"}",
    "many lists": b"[" + b"[]," * 2_000_000 + b"0]",
}


async def check(server: Any, where: str, body: Any, status: int, code: str, param: str | None) -> None:
    answer = await ask(server, f"/v1/{where}", body)
    told = (answer.status, answer.error["code"], answer.error["param"])
    assert told == (status, code, param), answer.body[:300]
    assert answer.error["message"] and answer.error["type"] == "invalid_request_error"
    assert (param or "") in answer.error["message"]  # OpenAI's SDK shows its user nothing else
    assert len(answer.body) < 4000
    assert answer.headers["x-should-retry"] == "false" and answer.headers["x-request-id"]
    assert (await ask(server, "/v1/chat/completions", CHAT)).status == 200
    assert server.forward.running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_chats_are_refused_by_name_and_the_server_goes_on(stream):
    async with serve_rest() as server:
        for code, table in (("invalid_argument", INVALID_CHAT), ("unsupported", UNSUPPORTED_CHAT)):
            for change, param in table:
                if not (stream and {"stream", "stream_options"} & change.keys()):
                    await check(server, "chat/completions", CHAT | {"stream": stream} | change, 400, code, param)


async def test_other_endpoints_refuse_by_name():
    async with serve_rest() as server:
        for case in OTHERS:
            await check(server, *case)


@pytest.mark.parametrize("name", RAW)
async def test_what_is_not_a_json_object_within_bounds(name):
    async with serve_rest() as server:
        await check(server, "chat/completions", RAW[name], 400, "invalid_argument", None)


@pytest.mark.parametrize("depth", [100, 900])
async def test_a_schema_that_is_nested_too_deep(depth):
    deep = OPEN + b', "guided_json": {"a":' + b"[" * depth + b"]" * depth + b"}}"
    async with serve_rest() as server:
        await check(server, "chat/completions", deep, 400, "invalid_argument", "guided_json")


async def test_a_body_over_the_limit():
    async with serve_rest() as server:
        body = json.dumps(CHAT | {"user": "x" * (9 << 20)}).encode()
        await check(server, "chat/completions", body, 413, "request_too_large", None)


async def test_every_fault_of_a_body_is_named():
    async with serve_rest() as server:
        body = {"messages": [{"role": "cat", "content": "x"}], "temperature": "hot", "frob": 1}
        message = (await ask(server, "/v1/chat/completions", body)).error["message"]
        for path in ("model:", "messages[0].role:", "temperature:", "frob:"):
            assert path in message
        for body in (CHAT | {"messages": ["hi"]}, CHAT | {"messages": {}}, CHAT | {"stream_options": 3}):
            told = (await ask(server, "/v1/chat/completions", body)).error["message"]
            assert "must be a" in told and "Shape" not in told  # no names of ours
        told = (await ask(server, "/v1/chat/completions", CHAT | {"max_tokens": 10**12})).error["message"]
        assert told == f"max_tokens: {10**12} is out of range: 1 .. {2**31}"


async def test_a_large_body_within_the_limit_passes():
    async with serve_rest() as server:
        big = {"model": "chat", "messages": [{"role": "user", "content": 'a,[{:"' * 900_000}]}
        assert (await ask(server, "/v1/chat/completions", big)).status == 200
        assert len(server.forward.calls[0][1].messages[0].content) == 5_400_000


async def test_what_asks_for_nothing_is_accepted():
    async with serve_rest() as server:
        nothing = {"audio": None, "modalities": ["text"], "best_of": 1, "seed": None, "functions": [], "stop": None}
        history = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
             "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "r"}]},
        ]  # fmt: skip
        answer = await ask(server, "/v1/chat/completions", CHAT | nothing | {"messages": history})
        assert answer.status == 200, answer.body
        assert "x-infermesh-ignored" not in answer.headers


async def test_bodies_that_are_not_plain_json():
    async with serve_rest() as server:
        data = json.dumps(CHAT).encode()
        for headers, param in (
            ({"content_type": None}, "content-type"),
            ({"content_type": "text/plain"}, "content-type"),
            ({"content_encoding": "gzip"}, "content-encoding"),
        ):
            answer = await ask(server, "/v1/chat/completions", data, **headers)
            assert answer.status == 400 and answer.error["param"] == param
        answer = await ask(server, "/v1/chat/completions", data, content_type="application/json; charset=utf-8")
        assert answer.status == 200


async def test_a_chunked_body_is_bounded_too():
    async with serve_rest() as server:
        async with connection(server) as client:
            await client.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
            piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            for _ in range(144):  # 9 MiB
                await client.send(piece)
            await client.send(b"0\r\n\r\n")
            answer = await client.answer()
            assert answer.status == 413 and answer.headers["connection"] == "close"
        async with connection(server) as client:
            await client.send(raw_request("/v1/chat/completions", b"", content_length=str(1 << 40)))
            assert (await client.answer()).status == 413
