"""An instance dies under a burst: everything it had, and nobody had heard of yet, is answered by another one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.mesh_pb2 import ListInstancesRequest
from tests.kit.mesh import running_mesh, until

BURST = 40


async def test_a_burst_survives_the_death_of_an_instance(tmp_path: Path) -> None:
    slow = ("--step-ms", "1000", "--max-running", "64")  # the router sees prompts that cost nothing: all go out at once
    async with running_mesh(tmp_path, {"one": slow, "two": slow}) as mesh:

        async def ask(number: int) -> int:
            message = lm.Message(role=lm.ROLE_USER, content=" ".join(f"q{number}.{word}" for word in range(20)))
            request = lm.ChatRequest(model="chat", messages=[message])
            request.sampling.max_tokens = 3
            return sum([len(delta.token_ids) async for reply in mesh.llm.Chat(request) for delta in reply.deltas])

        asked = [asyncio.create_task(ask(number)) for number in range(BURST)]

        async def both_busy() -> bool:
            listed = await mesh.mesh.ListInstances(ListInstancesRequest())
            return all(instance.in_flight > 10 for instance in listed.instances)

        await until(both_busy, 5)
        mesh.instances["one"].kill()
        assert await asyncio.gather(*asked) == [3] * BURST
