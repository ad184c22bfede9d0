"""Requests go to the instance that holds their prefix: scripted engines with real prefix caches, real gateways."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc as lm_grpc
from infermesh.v1 import worker_pb2 as wk
from infermesh.v1 import worker_pb2_grpc
from services.chassis.prefix import prefix
from tests.kit.cache_listener import CacheListener
from tests.kit.children import Child, infermesh
from tests.kit.mesh import TestMesh, running_mesh, until

SPEED = ("--prefill-tps", "20000", "--step-ms", "1")
TOPICS = 14  # so many that both instances get some, whatever the day's hashes are
VOCABULARY = ("lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "elit", "sed")
WORDS = 500  # of a topic: the scripted engine's tokens


def topic(number: int, seed: int = 0) -> str:
    rng = random.Random(1000 * seed + number)
    return " ".join(rng.choice(VOCABULARY) for _ in range(WORDS))


def chat(text: str) -> lm.ChatRequest:
    request = lm.ChatRequest(model="chat", messages=[lm.Message(role=lm.ROLE_USER, content=text)])
    request.sampling.max_tokens = 4
    return request


async def ask(stub: Any, text: str) -> tuple[str, int, int]:
    """Who answered, its prompt tokens, and how many it found cached."""
    started: lm.Started | None = None
    async for event in stub.Chat(chat(text)):
        if event.HasField("started"):
            started = event.started
    assert started is not None
    return started.instance_id, started.prompt_tokens, started.cached_tokens


@asynccontextmanager
async def second_gateway(mesh: TestMesh, *ids: str) -> AsyncIterator[Any]:
    """A gateway in a process of its own that shares nothing with the first but the registry."""
    flags = ("--grpc", "127.0.0.1:0", "--http", "", "--registry", mesh.registry)
    child = Child(mesh.folder, "gateway-2", infermesh("gateway", *flags))
    try:
        await until(lambda: child.serves, 20)
        async with grpc.aio.insecure_channel(child.told()["grpc"]) as channel:
            stub = lm_grpc.LanguageModelServiceStub(channel)
            seen: set[str] = set()
            async with asyncio.timeout(10):
                at = 0
                while seen != set(ids):  # it has Links to all
                    seen.add((await ask(stub, f"{at} {topic(at, seed=99)}"))[0])
                    at += 1
            yield stub
    finally:
        child.end()


async def only_a_holds(mesh: TestMesh) -> None:
    """All topics are computed while nobody else is there, so that no rule but knowledge sends their repeats there."""
    for number in range(TOPICS):
        assert (await ask(mesh.llm, topic(number) + " first"))[0] == "a"
    await mesh.start("b", *SPEED)
    await mesh.healthy("a", "b")


async def test_repeats_go_to_the_holder_and_what_nobody_holds_spreads(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": SPEED}) as mesh:
        await only_a_holds(mesh)
        rng = random.Random(1)
        at_home = tokens = cached = 0
        for turn in range(60):
            id, prompt, found = await ask(mesh.llm, f"{topic(rng.randrange(TOPICS))} question {turn}")
            at_home += id == "a"
            tokens += prompt
            cached += found
        assert at_home >= 57
        assert cached / tokens > 0.9
        cold = Counter([(await ask(mesh.llm, topic(number, seed=7)))[0] for number in range(16)])
        assert set(cold) == {"a", "b"}


async def test_gateways_that_share_nothing_agree(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": SPEED}) as mesh:
        await only_a_holds(mesh)
        async with second_gateway(mesh, "a", "b") as other:
            owners = ["a"] * TOPICS
            owners += [(await ask(mesh.llm, topic(number) + " first"))[0] for number in range(TOPICS, 2 * TOPICS)]
            await asyncio.sleep(1.5)
            agreed = 0
            for turn in range(2 * len(owners)):
                number = turn % len(owners)
                id, prompt, found = await ask(other, f"{topic(number)} question {turn}")
                agreed += id == owners[number] and found > 0.9 * prompt
            assert agreed >= 0.95 * 2 * len(owners)


async def test_a_new_life_holds_nothing(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": SPEED}) as mesh:
        await only_a_holds(mesh)
        mesh.instances["a"].destroy()
        await mesh.start("a", *SPEED)
        await mesh.healthy("a", "b")
        owners = []
        for number in range(TOPICS):
            id, _, found = await ask(mesh.llm, topic(number) + " second")
            assert not found
            owners.append(id)
        assert "b" in owners, "a, which has just come back and starts slowly, is thought to hold them still"
        for number, owner in enumerate(owners):
            id, prompt, found = await ask(mesh.llm, topic(number) + " third")
            assert id == owner and found > 0.9 * prompt


async def test_instances_tell_what_they_hold_and_what_they_forget(tmp_path: Path) -> None:
    small = (*SPEED, "--kv-tokens", "2048")
    async with running_mesh(tmp_path, {"a": small}) as mesh:
        stub: Any = worker_pb2_grpc.WorkerServiceStub(await mesh.dial(mesh.instances["a"].address))
        await ask(mesh.llm, topic(0))
        early, late = CacheListener(stub, "early"), CacheListener(stub, "late")
        async with early:
            await until(lambda: early.frames and early.known)
            assert early.frames[0].snapshot
            before = set(early.known)
            length = len(prefix(chat(topic(0)), b"", 0).chain)
            assert len(before) == length
            for number in range(1, 6):
                await ask(mesh.llm, topic(number))
            await until(lambda: not before & early.known and len(early.known) > length)
            assert any(frame.removed for frame in early.frames)
            async with late:
                await until(lambda: late.known == early.known)
                assert late.frames[0].snapshot


async def test_who_does_not_ask_for_cache_frames_gets_none(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": SPEED}) as mesh:
        stub: Any = worker_pb2_grpc.WorkerServiceStub(await mesh.dial(mesh.instances["a"].address))
        call = stub.Link()
        await call.write(wk.LinkRequest(hello=wk.GatewayHello(gateway_id="old", load_interval_ms=20)))
        await ask(mesh.llm, topic(0))
        seen = set()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                while True:
                    seen.add((await call.read()).WhichOneof("frame"))
        assert seen == {"hello", "load"}
        call.cancel()
