"""The REST front over the real forwarder and scripted instances in processes of their own."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from infermesh.v1.mesh_pb2 import ListInstancesRequest
from tests.e2e.rest_server import ask, connection, raw_request, sse_events
from tests.e2e.test_rest_bad_input import CHAT, INVALID_CHAT, RAW, UNSUPPORTED_CHAT, tool
from tests.kit.mesh import TestMesh, running_mesh, until

FAST = ("--prefill-tps", "1e6", "--step-ms", "1")
SLOW = ("--prefill-tps", "1e6", "--step-ms", "20")
# what only other engines serve, and how the caller called it
UNSERVED_HERE: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_regex": "a"}, "guided_regex"),
    (tool("f"), "tools"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
]


@dataclass
class Http:
    """Where to send requests, as the test client wants it."""

    port: int


def rest(mesh: TestMesh) -> Http:
    return Http(int(mesh.http.rpartition(":")[2]))


async def loads(mesh: TestMesh) -> int:
    """What runs and waits, by the instances' own count and the gateway's."""
    listed = await mesh.mesh.ListInstances(ListInstancesRequest())
    return sum(one.in_flight + one.load.running + one.load.waiting for one in listed.instances)


async def test_bad_chats_against_the_real_forwarder(tmp_path):
    async with running_mesh(tmp_path, {"a": FAST}, http="127.0.0.1:0") as mesh:
        server: Any = rest(mesh)
        for code, table in (("invalid_argument", INVALID_CHAT), ("unsupported", UNSUPPORTED_CHAT)):
            for change, param in table:
                answer = await ask(server, "/v1/chat/completions", CHAT | change)
                told = (answer.status, answer.error["code"], answer.error["param"])
                assert told == (400, code, param), answer.body[:300]
        for change, param in UNSERVED_HERE:
            answer = await ask(server, "/v1/chat/completions", CHAT | change)
            assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "unsupported", param)
        for name, body in RAW.items():
            assert (await ask(server, "/v1/chat/completions", body)).status == 400, name
        missing = await ask(server, "/v1/chat/completions", CHAT | {"model": "nope"})
        assert missing.status == 404 and missing.error["code"] == "model_not_found"
        good = await ask(server, "/v1/chat/completions", CHAT | {"max_tokens": 3})
        assert good.status == 200 and good.headers["x-infermesh-instance-id"] == "a"

        async def idle() -> bool:
            return await loads(mesh) == 0

        await until(idle, 10)  # the instance's last report may be a moment old


async def test_a_hundred_clients_vanish_and_the_engine_is_idle(tmp_path):
    async with running_mesh(tmp_path, {"a": (*SLOW, "--max-running", "128")}, http="127.0.0.1:0") as mesh:
        server: Any = rest(mesh)
        writers = []
        for number in range(100):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            body = CHAT | {"stream": number % 2 == 0, "max_tokens": 2000, "ignore_eos": True}
            writer.write(raw_request("/v1/chat/completions", body))
            writers.append(writer)

        async def all_run() -> bool:
            listed = await mesh.mesh.ListInstances(ListInstancesRequest())
            return sum(one.load.running for one in listed.instances) == 100

        await until(all_run, 30)
        for writer in writers:
            writer.transport.abort()

        async def idle() -> bool:
            return await loads(mesh) == 0

        await until(idle, 10)  # they had 40 s to go


async def test_an_instance_dies(tmp_path):
    """A stream that had begun goes on elsewhere and is whole; the next request goes there at once."""
    async with running_mesh(tmp_path, {"a": SLOW, "b": SLOW}, http="127.0.0.1:0") as mesh:
        server: Any = rest(mesh)
        async with connection(server) as client:
            await client.send(raw_request("/v1/chat/completions", CHAT | {"stream": True, "max_tokens": 200}))
            _, headers = await client.head()
            parts = [await client.chunk()]
            mesh.instances[headers["x-infermesh-instance-id"]].kill()
            while part := await asyncio.wait_for(client.chunk(), 10):
                parts.append(part)
        lines = [line for line in b"".join(parts).decode().split("\n\n") if line.startswith("data: {")]
        words = [json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines]
        assert "".join(words) == "".join(f" w{number}" for number in range(200))
        assert b'"x-infermesh-resumes":1' in parts[-1] and parts[-1].endswith(b"data: [DONE]\n\n")
        answer = await ask(server, "/v1/chat/completions", CHAT | {"stream": True, "max_tokens": 4})
        assert answer.status == 200 and sse_events(answer)[-1] == "[DONE]"
        assert answer.headers["x-infermesh-instance-id"] != headers["x-infermesh-instance-id"]


async def test_an_instance_dies_under_whole_answers(tmp_path):
    """Their callers have had nothing yet: whatever was lost begins anew on the other one, and nobody notices."""
    async with running_mesh(tmp_path, {"a": SLOW, "b": SLOW}, http="127.0.0.1:0") as mesh:
        server: Any = rest(mesh)
        prompts = {"model": "chat", "prompt": ["x", "y"], "max_tokens": 150}
        asks = [ask(server, "/v1/chat/completions", CHAT | {"max_tokens": 150}) for _ in range(3)]
        running = asyncio.gather(*asks, ask(server, "/v1/completions", prompts))

        async def all_begun() -> bool:
            listed = await mesh.mesh.ListInstances(ListInstancesRequest())
            return sum(one.load.running for one in listed.instances) == 5

        await until(all_begun, 20)
        mesh.instances["a"].kill()
        *chats, completion = await running
        whole = "".join(f" w{number}" for number in range(150))
        for answer in chats:
            assert answer.status == 200 and answer.json["choices"][0]["message"]["content"] == whole
            assert answer.json["usage"]["completion_tokens"] == 150
        assert [choice["text"] for choice in completion.json["choices"]] == [whole, whole]
        assert {answer.headers["x-infermesh-instance-id"] for answer in chats} == {"b"}
        assert max(int(answer.headers["x-infermesh-attempts"]) for answer in chats) == 2

        async def idle() -> bool:
            return await loads(mesh) == 0

        await until(idle, 10)


async def test_metrics_and_readiness(tmp_path):
    async with running_mesh(tmp_path, {"a": FAST}, http="127.0.0.1:0") as mesh:
        server: Any = rest(mesh)
        assert (await ask(server, "/readyz", method="GET")).status == 200
        await ask(server, "/v1/chat/completions", b"{")
        metrics = await ask(server, "/metrics", method="GET")
        assert metrics.status == 200 and b"infermesh" in metrics.body
        mesh.instances["a"].kill()

        async def unready() -> bool:
            return (await ask(server, "/readyz", method="GET")).status == 503

        await until(unready, 20)
        lost = await ask(server, "/v1/chat/completions", CHAT)
        assert lost.status in (404, 503), lost.body
        assert lost.error["code"] in ("no_instance", "model_not_found")
