"""`infermesh up --ray` for real: a cluster of two nodes, one of which dies under traffic."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infermesh.client.aio import AsyncClient
from tests.e2e.test_up import Up, up, wait_for
from tests.kit.ray_cluster import RayCluster, ray_cluster

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: infermesh[ray]"),
    pytest.mark.slow,
    pytest.mark.timeout(400),
]
HEAD, OTHER = "127.0.0.2", "127.0.0.3"
FLEET = """
version: 1
models:
  - {id: demo, kind: llm}
nodes:
  - {name: any, device: box, count: 2}
  - {name: large, device: H20-96G, count: 8}
instances:
  - {id: s1, model: demo, engine: scripted, node: any, speed: {prefill_tps: 100000, step_ms: 4}}
  - {id: s2, model: demo, engine: scripted, node: any, speed: {prefill_tps: 100000, step_ms: 4}}
  - {id: late, model: demo, engine: scripted, node: large, speed: {prefill_tps: 100000, step_ms: 4}}
"""
WORDS = 150


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as made:
        made.start(HEAD, 2, '{"device:box": 2}')
        made.start(OTHER, 2, '{"device:box": 2}')
        yield made


def host(mesh: Up, id: str) -> str:
    """Where an instance stands, once it is ready."""
    child = mesh.child(id)
    return str(child.get("address", "")).rpartition(":")[0] if child.get("state") == "ready" else ""


async def talk(address: str, over: Callable[[], bool]) -> int:
    """Streams answers, four at a time, until `over`; every one of them must be whole. Returns how many."""
    expected, answered = "".join(f" w{number}" for number in range(WORDS)), 0

    async def one(mesh: AsyncClient) -> None:
        nonlocal answered
        while not over():
            parts = [part.text async for part in mesh.chat_stream("hello", model="demo", max_tokens=WORDS)]
            assert "".join(parts) == expected
            answered += 1

    async with AsyncClient(address) as mesh:
        await asyncio.gather(*(one(mesh) for _ in range(4)))
    return answered


def test_an_instance_of_a_dead_node_comes_back_on_another_one(tmp_path: Path, cluster: RayCluster) -> None:
    with up(tmp_path, FLEET, "--ray", cluster.head, "--grace-s", "5") as mesh:
        wait_for(lambda: mesh.is_ready("gateway", "s1", "s2"), 90)
        assert {host(mesh, "s1"), host(mesh, "s2")} == {HEAD, OTHER}, "two of one model stand apart"
        wait_for(lambda: "The mesh is up." in (tmp_path / "stdout").read_text())
        assert "late  pending: needs a host with device:H20-96G" in (tmp_path / "stdout").read_text()
        assert "ray start --address=… --resources='{\"device:H20-96G\": 1}'" in mesh.errors()
        victim = "s1" if host(mesh, "s1") == OTHER else "s2"
        back = False

        async def kill_and_wait() -> int:
            nonlocal back
            talking = asyncio.create_task(talk(mesh.run_file()["gateway"], lambda: back))
            await asyncio.sleep(1)
            await asyncio.to_thread(cluster.nodes[OTHER].die)
            await asyncio.to_thread(wait_for, lambda: host(mesh, victim) == HEAD, 90)
            await asyncio.sleep(1)
            back = True
            return await talking

        assert asyncio.run(kill_and_wait()) > 8
        assert "ended with exit code 75" in mesh.errors()
        mesh.signal(signal.SIGTERM)
        assert mesh.process.wait(60) == 0 and mesh.left() == []
    assert not list(cluster.tmp(HEAD).glob("infermesh-*")), "what was written on the node is gone, too"
