"""Which ids callers are told: renamed, hidden, on answers and on errors, by gRPC and REST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest

from infermesh.errors import from_rpc
from infermesh.v1 import language_model_pb2 as lm
from tests.kit.mesh import TestMesh, running_mesh

INSTANCE, MODEL = "rack7-card3", "real-model"
SPEED = ("--prefill-tps", "1e6", "--step-ms", "1")
WHOLE, BROKEN = (*SPEED,), (*SPEED, "--fail-after-tokens", "3")
HEADERS = ("x-infermesh-instance-id", "x-infermesh-model-id")


async def told(mesh: TestMesh) -> tuple[set[tuple[str, ...]], str]:
    """The pairs of ids that callers saw on all paths, and everything that they got, as text."""
    seen, text = set(), ""
    message = {"role": "user", "content": "hi"}
    async with aiohttp.ClientSession(f"http://{mesh.http}") as session:
        for streamed in (False, True):
            body = {"model": MODEL, "messages": [message], "max_tokens": 6, "stream": streamed}
            async with session.post("/v1/chat/completions", json=body) as answer:
                seen.add(tuple(answer.headers.get(name, "") for name in HEADERS))
                text += str(answer.headers) + await answer.text()
    request = lm.ChatRequest(model=MODEL, sampling=lm.Sampling(max_tokens=6))
    request.messages.add(role=lm.ROLE_USER, content="hi")
    call = mesh.llm.Chat(request)
    try:
        async for event in call:
            text += str(event)
    except grpc.aio.AioRpcError as error:
        failure = from_rpc(error)
        seen.add((failure.instance_id, failure.model_id))
        text += f"{failure} {error}"
    metadata: dict[str, Any] = dict(await call.initial_metadata())
    seen.add(tuple(metadata.get(name, "") for name in HEADERS))
    return seen, text + str(metadata) + str(await call.trailing_metadata())


@pytest.mark.parametrize("flags", [WHOLE, BROKEN], ids=["answers", "errors"])
async def test_ids_are_shown_renamed_or_hidden_on_every_path(tmp_path: Path, flags: tuple[str, ...]) -> None:
    instances = {INSTANCE: flags}
    for name, rule, expected in (
        ("plain", {}, (INSTANCE, MODEL)),
        ("renamed", {INSTANCE: {"instance_id": "gpu-node-1"}}, ("gpu-node-1", MODEL)),
        ("hidden", {"*": {"enable": False}}, ("", "")),
    ):
        folder = tmp_path / name
        folder.mkdir()
        async with running_mesh(folder, instances, MODEL, http="127.0.0.1:0", telemetry=rule) as mesh:
            seen, text = await told(mesh)
            assert seen == {expected}, name
            assert (INSTANCE in text) == (name == "plain"), text
