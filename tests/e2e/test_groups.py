"""A group of instances that is scaled: what a launcher reads over RPC and an autoscaler from the metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.mesh_pb2 import Group, ListInstancesRequest
from tests.kit.mesh import TestMesh, running_mesh, until

pytestmark = pytest.mark.timeout(120)
SLOW = ("--group", "chat-cpu", "--prefill-tps", "100", "--step-ms", "1", "--max-running", "4")


async def only_group(mesh: TestMesh) -> Group:
    (group,) = (await mesh.mesh.ListInstances(ListInstancesRequest())).groups
    return group


async def exposed(mesh: TestMesh) -> list[str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{mesh.http}/metrics") as answer:
        return [line for line in (await answer.text()).splitlines() if line.startswith("infermesh_gateway_desired")]


async def test_an_overloaded_group_asks_for_more(tmp_path: Path) -> None:
    routing = {"scale": {"chat-cpu": {"least": 1, "most": 3}}}
    async with running_mesh(tmp_path, {}, http="127.0.0.1:0", routing=routing) as mesh:
        group = await only_group(mesh)
        assert (group.name, group.least, group.most, group.desired, group.replicas) == ("chat-cpu", 1, 3, 0, 0)
        assert await exposed(mesh) == []
        await mesh.start("slow", *SLOW)
        await mesh.start("alone", "--prefill-tps", "100")
        await mesh.healthy("slow", "alone")

        async def seen() -> bool:
            return (await only_group(mesh)).desired == 1

        await until(seen, 30)
        group = await only_group(mesh)
        assert (group.kind, group.model, group.replicas) == ("llm", "chat", 1)
        assert await exposed(mesh) == ['infermesh_gateway_desired_replicas{group="chat-cpu"} 1.0']

        async def ask(number: int) -> None:
            message = lm.Message(role=lm.ROLE_USER, content=f"{number} " + "word " * 400)
            request = lm.ChatRequest(model="chat", messages=[message], sampling=lm.Sampling(max_tokens=2))
            async for _ in mesh.llm.Chat(request):
                pass

        tasks = [asyncio.create_task(ask(number)) for number in range(40)]

        async def more() -> bool:
            return (await only_group(mesh)).desired > 1

        await until(more, 60)
        group = await only_group(mesh)
        assert group.backlog_s > 2 and group.why.startswith("more: ")
        assert (await exposed(mesh))[0].startswith('infermesh_gateway_desired_replicas{group="chat-cpu"} ')
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
