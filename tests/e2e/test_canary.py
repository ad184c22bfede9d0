"""What people write is nowhere but in their answers: a canary is sent every way in, and every sink is searched."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from tests.kit.answering import answering_mesh
from tests.kit.collector import collector
from tests.kit.embedding import MODEL

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CANARY = "kanarienvogel-4711"
DEBUG = ("--log-level", "debug")
SPEED = ("--prefill-tps", "1e6", "--step-ms", "1", *DEBUG)


async def test_no_sink_holds_a_prompt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    past = tmp_path / "past"
    async with collector() as sink:
        spans = ("--otlp", sink.address)
        llms = {"whole": (*SPEED, *spans), "broken": (*SPEED, *spans, "--fail-after-tokens", "2")}
        own = {"http": "127.0.0.1:0", "otlp": sink.address, "explain_dir": past, "log_level": "debug"}
        async with (
            answering_mesh(tmp_path, llms, (*DEBUG, *spans), **own) as mesh,
            aiohttp.ClientSession(f"http://{mesh.http}") as session,
        ):
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
    out = capfd.readouterr()
    sinks["the gateway's log"] = out.out + out.err
    assert '"event": "request"' in sinks["the gateway's log"]
    assert any(str(past) in name and text for name, text in sinks.items()), "the ring of past decisions was not written"
    assert [name for name, text in sinks.items() if CANARY in text] == []


def _files(folder: Path) -> dict[str, str]:
    return {str(path): path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()}
