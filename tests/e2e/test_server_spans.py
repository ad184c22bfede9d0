"""Every request, over REST and gRPC, has one server span with its status: also one that came nowhere."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest

from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import embedding_pb2_grpc, retrieve_pb2_grpc
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1 import retrieve_pb2 as rt
from tests.kit.collector import Span, collector
from tests.kit.mesh import TestMesh, running_mesh, until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KEY = {"authorization": "Bearer alice"}
LARGE = 4096  # bytes of a body
SAID = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"model": "chat", "messages": SAID, "max_tokens": 3}
LLM = "infermesh.v1.LanguageModelService"


class Asked:
    """What was asked, each in a trace of its own, and what its server span is to be."""

    def __init__(self) -> None:
        self.wanted: dict[str, tuple[str, str, dict[str, Any]]] = {}

    def trace(self, label: str, name: str, **attributes: Any) -> dict[str, str]:
        """Headers of a new request. `attributes`: the dots of their names are underlines here."""
        id = secrets.token_hex(16)
        self.wanted[id] = (label, name, attributes)
        return {"traceparent": f"00-{id}-b7ad6b7169203331-01"}

    def served(self, spans: list[Span]) -> bool:
        return set(self.wanted) <= {span.trace for span in spans if span.kind == "server"}

    def check(self, spans: list[Span]) -> None:
        for id, (label, name, attributes) in self.wanted.items():
            (span,) = [one for one in spans if one.trace == id and one.kind == "server"]
            assert span.name == name, label
            found = {key.replace(".", "_"): value for key, value in span.attributes.items()}
            assert {key: found.get(key) for key in attributes} == attributes, label
            assert span.failed == ("error.type" in span.attributes), label


async def rest(asked: Asked, base: str, port: int) -> None:
    async with aiohttp.ClientSession(base, headers=KEY) as session:

        async def ask(label: str, name: str, status: int, error: str | None, path: str, **how: Any) -> None:
            told = asked.trace(label, name, http_response_status_code=status, error_type=error)
            method, headers = how.pop("method", "POST"), how.pop("headers", {}) | told
            async with session.request(method, path, headers=headers, **how) as answer:
                await answer.read()
                assert answer.status == status, (label, await answer.text())

        json, path = {"content-type": "application/json"}, "/v1/chat/completions"
        await ask("whole", "route", 200, None, path, json=CHAT)
        await ask("streamed", "route", 200, None, path, json=CHAT | {"stream": True})
        await ask("no such model", "route", 404, "model_not_found", path, json=CHAT | {"model": "x"})
        await ask("out of range", "route", 400, "invalid_argument", path, json=CHAT | {"max_tokens": -1})
        refused = f"POST {path}"
        stranger = {"authorization": "Bearer mallory"}
        await ask("a stranger", refused, 401, "unauthenticated", path, json=CHAT, headers=stranger)
        await ask("no JSON", refused, 400, "invalid_argument", path, data=b"{", headers=json)
        await ask("too large", refused, 413, "request_too_large", path, data=b" " * (LARGE + 1), headers=json)
        await ask("a wrong method", refused, 404, "not_found", path, method="PUT")
        await ask("no such path", "POST", 404, "not_found", "/v1/nothing", json={})
        await ask("an odd method", "_OTHER", 404, "not_found", "/v1/nothing", method="PURGE")
        await ask("models", "GET /v1/models", 200, None, "/v1/models", method="GET")
        two = {"model": "chat", "prompt": ["one", "two"], "max_tokens": 3}
        await ask("two prompts", "POST /v1/completions", 200, None, "/v1/completions", json=two)
        await ask("two, streamed", "POST /v1/completions", 200, None, "/v1/completions", json=two | {"stream": True})
        bad = two | {"model": "x"}
        await ask("two for nobody", "POST /v1/completions", 404, "model_not_found", "/v1/completions", json=bad)
    left = asked.trace("left half-way", refused, http_response_status_code=499, error_type="cancelled")
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = {"host": "x", "content-length": "100", **KEY, **json, **left}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", "{"]
    writer.write("\r\n".join(lines).encode())
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()


async def rpc(asked: Asked, mesh: TestMesh) -> None:
    async def ask(label: str, name: str, method: str, status: str, error: str | None, call: Callable[..., Any]) -> None:
        told = asked.trace(label, name, rpc_method=method, rpc_response_status_code=status, error_type=error)
        stranger = {"authorization": "Bearer mallory"} if label == "a stranger" else {}
        found = "OK"
        try:
            async for _ in call(metadata=tuple((KEY | stranger | told).items())):
                pass
        except grpc.aio.AioRpcError as failed:
            found = failed.code().name
        assert found == status, label

    message = lm.Message(role=lm.ROLE_USER, content="hello")
    chat = lm.ChatRequest(model="chat", messages=[message], sampling=lm.Sampling(max_tokens=3))
    nobody = lm.ChatRequest(model="x", messages=[message])
    method = f"{LLM}/Chat"

    def of(request: lm.ChatRequest) -> Callable[..., Any]:
        return lambda **how: mesh.llm.Chat(request, **how)

    await ask("gRPC", "route", method, "OK", None, of(chat))
    await ask("gRPC, no such model", "route", method, "NOT_FOUND", "model_not_found", of(nobody))
    await ask("a stranger", method, method, "UNAUTHENTICATED", "unauthenticated", of(chat))
    raw = mesh.channel.unary_stream(f"/{method}")
    await ask("no message", method, method, "INVALID_ARGUMENT", "invalid_argument", lambda **how: raw(b"\xff", **how))
    bulk = embedding_pb2_grpc.EmbeddingServiceStub(mesh.channel)
    answers = retrieve_pb2_grpc.RetrieveServiceStub(mesh.channel)

    async def batches() -> AsyncIterator[em.EmbedStreamRequest]:
        yield em.EmbedStreamRequest(batch=em.EmbedRequest(model="x", texts=["a"]))

    method = "infermesh.v1.EmbeddingService/EmbedStream"
    await ask("bulk", method, method, "NOT_FOUND", "model_not_found", lambda **how: bulk.EmbedStream(batches(), **how))
    method = "infermesh.v1.RetrieveService/Answer"
    empty = rt.AnswerRequest()
    invalid = ("INVALID_ARGUMENT", "invalid_argument")
    await ask("no question", method, method, *invalid, lambda **how: answers.Answer(empty, **how))


async def test_each_has_one(tmp_path: Path) -> None:
    keys, operator = tmp_path / "keys.yaml", tmp_path / "operator.key"
    lines = [
        f"  - {{sha256: {hashlib.sha256(secret.encode()).hexdigest()}, {more}}}"
        for secret, more in (("alice", "tenant: a"), ("root", "tenant: o, role: operator"))
    ]
    keys.write_text("\n".join(["version: 1", "keys:", *lines]))
    operator.write_text("root\n")
    given = {"keys": keys, "operator_key_file": operator, "limits": {"max_body_bytes": LARGE}}
    asked = Asked()
    async with collector() as sink:
        async with running_mesh(tmp_path, {}, http="127.0.0.1:0", otlp=sink.address, otlp_ratio=0.0, **given) as mesh:
            pace = ("--prefill-tps", "1e6", "--step-ms", "1")
            await mesh.start("a", *pace, "--keys", str(keys), "--operator-key-file", str(operator))

            async def there() -> bool:
                who = (("authorization", "Bearer root"),)
                listed = await mesh.mesh.ListInstances(ms.ListInstancesRequest(), metadata=who)
                return [i.state for i in listed.instances] == ["healthy"]

            await until(there, 30)
            await rest(asked, f"http://{mesh.http}", int(mesh.http.rpartition(":")[2]))
            await rpc(asked, mesh)
            async with aiohttp.ClientSession(f"http://{mesh.http}") as session:
                for quiet in ("/healthz", "/readyz", "/console"):
                    await session.get(quiet, headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
            await until(lambda: asked.served(sink.spans), 20)
    asked.check(sink.spans)
    assert {span.trace for span in sink.spans} == set(asked.wanted), "a span that nobody asked for"
    for label, below in (("two prompts", 2), ("two, streamed", 2), ("bulk", 1)):
        (trace,) = [id for id, wanted in asked.wanted.items() if wanted[0] == label]
        (root,) = [span for span in sink.spans if span.trace == trace and span.kind == "server"]
        routes = [span for span in sink.named("route", trace) if span.parent == root.id]
        assert len(routes) == below and {span.kind for span in routes} == {"internal"}, label
