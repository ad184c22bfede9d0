"""Which names of models a key opens, over both doors: weighted aliases, fallbacks, and what stays out of sight."""

from __future__ import annotations

import asyncio
import hashlib
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from infermesh.errors import from_rpc
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1.inference_pb2 import DEGRADE_ALLOW, Hints
from tests.kit.mesh import TestMesh, running_mesh, until

KEYS = {
    "alias": "tenant: a, models: [chat]",
    "first": "tenant: b, models: [v1]",
    "both": "tenant: c, models: [v1, small]",
    "root": "tenant: o, role: operator",
}
ROUTING = {
    "ttft_s": 0.05,
    "fallbacks": {"v1": "small"},
    "aliases": {"chat": [{"model": "v1", "weight": 1}, {"model": "v2", "weight": 1}]},
}
SLOW = ("--prefill-tps", "1500", "--step-ms", "1", "--max-running", "4")
FAST = ("--prefill-tps", "100000", "--step-ms", "1")


def who(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


def chat(model: str, words: int = 2, **more: Any) -> lm.ChatRequest:
    message = lm.Message(role=lm.ROLE_USER, content=f"{model} {words} " + "hello " * words)
    return lm.ChatRequest(model=model, messages=[message], sampling=lm.Sampling(max_tokens=2), **more)


async def served(mesh: TestMesh, request: lm.ChatRequest, key: str) -> dict[str, Any]:
    """The answer's identity."""
    call = mesh.llm.Chat(request, metadata=who(key))
    assert [event async for event in call]
    return dict(await call.initial_metadata() or ())


async def rest(mesh: TestMesh, path: str, key: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    def ask() -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"http://{mesh.http}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    return await asyncio.to_thread(ask)


async def test_a_key_opens_its_names_and_what_stands_behind_them(tmp_path: Path) -> None:
    keys, operator = tmp_path / "keys.yaml", tmp_path / "operator.key"
    lines = [f"  - {{sha256: {hashlib.sha256(key.encode()).hexdigest()}, {more}}}" for key, more in KEYS.items()]
    keys.write_text("\n".join(["version: 1", "keys:", *lines]))
    operator.write_text("root\n")
    flags = ("--keys", str(keys), "--operator-key-file", str(operator))
    settings = {"keys": keys, "operator_key_file": operator, "routing": ROUTING, "http": "127.0.0.1:0"}
    async with running_mesh(tmp_path, {}, **settings) as mesh:
        await asyncio.gather(
            mesh.start("one", *SLOW, *flags, model="v1"),
            mesh.start("two", *FAST, *flags, model="v2"),
            mesh.start("tiny", *FAST, *flags, model="small"),
        )

        async def seen(key: str, model: str = "") -> list[str]:
            listed = await mesh.mesh.ListInstances(ms.ListInstancesRequest(model=model), metadata=who(key))
            return [i.id for i in listed.instances if i.state == "healthy"]

        async def all_there() -> bool:
            return await seen("root") == ["one", "tiny", "two"]

        await until(all_there, 60)

        # What is seen: an alias is listed with its variants for those who may name them.
        _, every = await rest(mesh, "/v1/models", "root")
        shown = {entry["id"]: entry for entry in every["data"]}
        assert list(shown) == ["chat", "small", "v1", "v2"]
        assert shown["chat"]["variants"] == [{"model": "v1", "weight": 1.0}, {"model": "v2", "weight": 1.0}]
        _, own = await rest(mesh, "/v1/models", "alias")
        assert [entry["id"] for entry in own["data"]] == ["chat"] and "v1" not in json.dumps(own)
        assert (await rest(mesh, "/v1/models/chat", "alias"))[0] == 200
        hidden, unknown = await rest(mesh, "/v1/models/v1", "alias"), await rest(mesh, "/v1/models/v9", "alias")
        assert hidden[0] == unknown[0] == 404
        assert json.dumps(hidden).replace("v1", "v9").replace("/v9/", "/v1/") == json.dumps(unknown)
        assert await seen("alias") == ["one", "two"] and await seen("first") == ["one"]
        assert await seen("root", "chat") == ["one", "two"] and await seen("both") == ["one", "tiny"]

        # What is served: the alias opens both models behind it, their own names stay closed, existing or not.
        got = {(await served(mesh, chat("chat"), "alias"))["x-infermesh-model-id"] for _ in range(24)}
        assert got == {"v1", "v2"}
        body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert (await rest(mesh, "/v1/chat/completions", "alias", body))[0] == 200
        told = set()
        for name in ("v1", "v9"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served(mesh, chat(name), "alias")
            told.add(from_rpc(caught.value).message.replace(name, "NAME"))
            assert from_rpc(caught.value).reason.value == "permission_denied"
            status, said = await rest(mesh, "/v1/chat/completions", "alias", {**body, "model": name})
            assert status == 403
            told.add(said["error"]["message"].replace(name, "NAME"))
        assert len(told) == 1, f"whether a model is there is not told to those who may not use it: {told}"
        for path in ("Explain",):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await mesh.mesh.Explain(ms.ExplainRequest(model="v1"), metadata=who("alias"))
            assert from_rpc(caught.value).reason.value == "permission_denied", path

        # A degrade stays within what the key may use.
        long = [asyncio.create_task(served(mesh, chat("v1", 2500 + n), "root")) for n in range(3)]
        await until(lambda: pressed(mesh))
        allow = Hints(degrade=DEGRADE_ALLOW)
        both = await served(mesh, chat("v1", hints=allow), "both")
        assert (both["x-infermesh-model-id"], both["x-infermesh-degraded"]) == ("small", "v1")
        first = await served(mesh, chat("v1", hints=allow), "first")
        assert first["x-infermesh-model-id"] == "v1" and "x-infermesh-degraded" not in first
        await asyncio.gather(*long)


async def pressed(mesh: TestMesh) -> bool:
    """Whether a newcomer would wait for v1."""
    request = ms.ExplainRequest(model="v1", prompt_tokens=10)
    record = json.loads((await mesh.mesh.Explain(request, metadata=who("root"))).decision_json)
    return any(candidate["terms"]["wait"] > 0.5 for candidate in record["candidates"])
