"""An instance dies under a burst: everything it had, and nobody had heard of yet, is answered by another one."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.mesh_pb2 import ListInstancesRequest
from tests.kit.mesh import running_mesh, until

BURST = 40
MIN_LOST = 8  # more than a retry budget would let go elsewhere at once


async def test_a_burst_survives_the_death_of_an_instance(tmp_path: Path) -> None:
    quick = ("--prefill-tps", "1000000", "--max-running", "64")  # prompts cost nothing: all go out at once
    async with running_mesh(tmp_path, {"one": quick, "two": quick}) as mesh:
        one, two = mesh.instances["one"], mesh.instances["two"]

        async def ask(number: int) -> int:
            message = lm.Message(role=lm.ROLE_USER, content=f"question {number}")
            request = lm.ChatRequest(model="chat", messages=[message])
            request.sampling.max_tokens = 3
            return sum([len(delta.token_ids) async for reply in mesh.llm.Chat(request) for delta in reply.deltas])

        async def stuck() -> bool:
            listed = await mesh.mesh.ListInstances(ListInstancesRequest())
            return any(instance.id == "one" and instance.in_flight > MIN_LOST for instance in listed.instances)

        for instance in (one, two):  # they take requests and answer none
            instance.popen.send_signal(signal.SIGSTOP)
        asked = [asyncio.create_task(ask(number)) for number in range(BURST)]
        await until(stuck, 20)
        one.kill()
        two.popen.send_signal(signal.SIGCONT)
        assert await asyncio.gather(*asked) == [3] * BURST
