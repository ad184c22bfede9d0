"""The scripted engine behind OpenAI's HTTP: what stock routers see of it is what the mesh sees."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest

from infermesh.transport import channel_options
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc as lm_grpc
from tests.kit.children import Child
from tests.kit.mesh import until

PROMPT = " ".join(f"word{number}" for number in range(64))


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[tuple[str, str]]:
    """Its HTTP and its gRPC address."""
    told = tmp_path / "http.json"
    words = ("--http-file", str(told), "--model", "m", "--listen", "127.0.0.1:0", "--step-ms", "1")
    child = Child(tmp_path, "engine", [sys.executable, "-P", "-m", "tests.kit.openai_port", *words])
    try:
        await until(lambda: child.serves, 60)
        yield "http://" + json.loads(told.read_text())["http"], child.address
        child.end()
    finally:
        child.destroy()


async def test_both_doors_lead_to_one_engine(engine: tuple[str, str]) -> None:
    http, address = engine
    async with aiohttp.ClientSession(trust_env=False) as session:
        asked = {"model": "m", "prompt": PROMPT, "max_tokens": 3, "echo": False, "stream": True}
        streamed = await _post(session, f"{http}/v1/completions", asked | {"stream_options": {"include_usage": True}})
        lines = [line for line in streamed.split("\n\n") if line]
        assert lines.pop() == "data: [DONE]"
        *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert [chunk["choices"][0]["text"] for chunk in chunks] == [" w0", " w1", " w2"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0} and not last["choices"]

        async with grpc.aio.insecure_channel(address, channel_options()) as channel:
            stub = lm_grpc.LanguageModelServiceStub(channel)
            request = lm.CompleteRequest(model="m", text=PROMPT, sampling=lm.Sampling(max_tokens=1))
            events = [event async for event in stub.Complete(request)]  # type: ignore[attr-defined]
        assert events[-1].usage.cached_tokens == 48, "what came in by HTTP, but for the block of the last token"

        message = {"role": "user", "content": "hello"}
        chat = {"model": "m", "messages": [message], "max_tokens": 2, "temperature": 0.5}
        whole = json.loads(await _post(session, f"{http}/v1/chat/completions", chat))
        assert whole["choices"][0]["message"] == {"role": "assistant", "content": " w0 w1"}
        assert whole["usage"]["completion_tokens"] == 2

        assert json.loads(await _get(session, f"{http}/v1/models"))["data"][0]["id"] == "m"
        assert await _get(session, f"{http}/health") == ""
        metrics = await _get(session, f"{http}/metrics")
        assert 'vllm:num_requests_running{model_name="m"} 0' in metrics
        assert f'vllm:prefix_cache_queries_total{{model_name="m"}} {64 + whole["usage"]["prompt_tokens"]}' in metrics


async def test_what_it_does_not_serve_is_refused_by_name(engine: tuple[str, str]) -> None:
    refused: tuple[tuple[Any, str], ...] = (
        ({"model": "m", "prompt": "a", "best_of": 3}, "best_of"),
        ({"model": "other", "prompt": "a"}, "other"),
        ({"model": "m"}, "prompt"),
        ({"model": "m", "prompt": PROMPT * 1000}, "prompt and answer together"),
        ([], "object"),
    )
    async with aiohttp.ClientSession(trust_env=False) as session:
        for body, named in refused:
            async with session.post(f"{engine[0]}/v1/completions", json=body) as reply:
                assert reply.status == 400
                assert named in (await reply.json())["error"]["message"]


async def _post(session: aiohttp.ClientSession, url: str, body: Any) -> str:
    async with session.post(url, json=body) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.text()


async def _get(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as reply:
        assert reply.status == 200
        return await reply.text()
