"""What people write is nowhere but in their answers: a canary is sent every way in, and every sink is searched."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from tests.kit.answering import answering_mesh
from tests.kit.children import Child, infermesh
from tests.kit.collector import collector
from tests.kit.embedding import MODEL
from tests.kit.mesh import until

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CANARY = "kanarienvogel-4711"
DEBUG = ("--log-level", "debug")
SPEED = ("--prefill-tps", "1e6", "--step-ms", "1", *DEBUG)


async def _ready(session: aiohttp.ClientSession) -> bool:
    """All four instances are known to the gateway."""
    async with session.get("/readyz") as answer:
        return answer.status == 200 and (await answer.json())["instances"] == 4


async def test_no_sink_holds_a_prompt(tmp_path: Path) -> None:
    past = tmp_path / "past"
    async with collector() as sink:
        spans = ("--otlp", sink.address)
        llms = {"whole": (*SPEED, *spans), "broken": (*SPEED, *spans, "--fail-after-tokens", "2")}
        async with AsyncExitStack() as stack:
            mesh = await stack.enter_async_context(answering_mesh(tmp_path, llms, (*DEBUG, *spans)))
            doors = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--grace-s", "1")
            words = infermesh(
                "gateway", "--registry", mesh.registry, *doors, "--explain-dir", str(past), *DEBUG, *spans
            )
            gateway = Child(tmp_path, "gateway", words)  # a process of its own: loggers keep the level they began with
            stack.callback(gateway.destroy)
            await until(lambda: gateway.serves, 60)
            session = await stack.enter_async_context(aiohttp.ClientSession(f"http://{gateway.told()['http']}"))
            await until(lambda: _ready(session), 20)
            said = {"role": "user", "content": f"{CANARY} please"}
            chat = {"model": "chat", "messages": [said], "max_tokens": 8}
            asked = [
                ("/v1/chat/completions", chat, 200),
                ("/v1/chat/completions", chat | {"stream": True}, 200),
                ("/v1/chat/completions", chat | {"max_tokens": -1}, 400),
                ("/v1/chat/completions", chat | {"model": "nobody"}, 404),
                ("/v1/chat/completions", chat | {"messages": [said | {"role": CANARY}]}, 400),
                ("/v1/completions", {"model": "chat", "prompt": CANARY, "max_tokens": 4}, 200),
                ("/v1/embeddings", {"model": MODEL, "input": [CANARY]}, 200),
                ("/v1/embeddings", {"model": MODEL, "input": CANARY, "dimensions": 99_999}, 400),
                ("/v1/rerank", {"model": MODEL, "query": CANARY, "documents": [CANARY, "b"]}, 200),
            ]
            for path, body, status in asked * 3:
                async with session.post(path, json=body) as answer:
                    await answer.read()
                    allowed = {status, 500, 503} if body.get("model") == "chat" else {status, 413}
                    assert answer.status in allowed, (path, body.get("model"), answer.status)
            sinks = {}
            for path in ("/metrics", "/console/api/state"):
                async with session.get(path) as answer:
                    assert answer.status == 200
                    sinks[path] = await answer.text()
            await sink.until(3, f"rerank {MODEL}")
            await sink.until(3, f"embeddings {MODEL}")
            await sink.until(3, "chat chat")
    sinks["spans"] = "".join(sink.raw)
    sinks |= _files(tmp_path)
    assert '"event": "request"' in sinks[str(gateway.log)]
    assert any(str(past) in name and text for name, text in sinks.items()), "the ring of past decisions was not written"
    assert [name for name, text in sinks.items() if CANARY in text] == []


def _files(folder: Path) -> dict[str, str]:
    return {str(path): path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()}
