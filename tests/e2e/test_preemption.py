"""A short prompt overtakes a long one in a real instance: who answers first, and that the long one loses nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.mesh_pb2 import ListInstancesRequest
from tests.kit.mesh import TestMesh, running_mesh, until

SLOW = ("--prefill-tps", "2000", "--step-ms", "1", "--prefill-chunk", "256")
WORDS = 24_000  # twelve seconds of prompt
Answer = tuple[lm.Started, list[int], int]


async def ask(mesh: TestMesh, text: str) -> Answer:
    request = lm.ChatRequest(model="chat", messages=[lm.Message(role=lm.ROLE_USER, content=text)])
    request.sampling.max_tokens = 5
    request.delivery.token_ids = True
    started, ids, cached = lm.Started(), [], -1
    async for reply in mesh.llm.Chat(request):
        if reply.HasField("started"):
            started = reply.started
        if reply.HasField("usage"):
            cached = reply.usage.cached_tokens
        ids += [id for delta in reply.deltas for id in delta.token_ids]
    return started, ids, cached


async def begun(mesh: TestMesh) -> None:
    """The long one is in the engine."""

    async def running() -> bool:
        listed = await mesh.mesh.ListInstances(ListInstancesRequest())
        return any(instance.load.kv_used_ratio > 0 for instance in listed.instances)

    await until(running, 30)


async def test_a_short_prompt_does_not_wait_for_a_long_one(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"one": SLOW}) as mesh:
        await ask(mesh, "what a token is " * 400)  # so that prompts are estimated as they are
        long = asyncio.create_task(ask(mesh, "word " * WORDS))
        await begun(mesh)
        for number in range(3):
            assert (await ask(mesh, f"short question {number}"))[1] == [0, 1, 2, 3, 4]
        assert not long.done(), "they did not wait for it"
        started, ids, cached = await long
        assert ids == [0, 1, 2, 3, 4] and started.prompt_tokens > WORDS
        assert 1 <= started.preempted <= 3
        assert (started.cached_tokens, cached) == (0, 0), "what it had computed itself was not cached before it came"
        again = await ask(mesh, "word " * WORDS)
        assert again[0].cached_tokens > 0.99 * WORDS and again[0].preempted == 0


async def test_callers_who_go_away_while_overtaken_leave_nothing_behind(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"one": SLOW}) as mesh:
        long = asyncio.create_task(ask(mesh, "word " * WORDS))
        await begun(mesh)
        short = asyncio.create_task(ask(mesh, "a question of some words " * 200))

        async def both_sent() -> bool:  # the short one does not wait in the gateway
            listed = await mesh.mesh.ListInstances(ListInstancesRequest())
            return listed.instances[0].in_flight == 2

        await until(both_sent, 8)
        long.cancel()
        assert (await short)[1] == [0, 1, 2, 3, 4]

        async def idle() -> bool:
            listed = await mesh.mesh.ListInstances(ListInstancesRequest())
            load = listed.instances[0].load
            return listed.instances[0].in_flight == 0 and load.running == 0 and load.waiting == 0

        await until(idle, 20)


async def test_the_operator_may_forbid_it(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"one": (*SLOW, "--no-preempt")}) as mesh:
        order: list[str] = []

        async def told(name: str, text: str) -> None:
            await ask(mesh, text)
            order.append(name)

        long = asyncio.create_task(told("long", "word " * (WORDS // 3)))
        await begun(mesh)
        await asyncio.gather(long, told("short", "short question"))
        assert order == ["long", "short"]
