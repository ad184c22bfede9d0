"""`infermesh up --ray` for real, on a cluster of two nodes: a pipeline across them, a class that grows, a node that
dies under traffic.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infermesh.client import AsyncClient
from tests.e2e.test_up import Up, up, wait_for, wrapper
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
  - {id: real, kind: llm, source: org/real}
nodes:
  - {name: any, device: box, count: 2}
  - {name: large, device: H20-96G, count: 8}
instances:
  - {id: s1, model: demo, engine: scripted, node: any, speed: {prefill_tps: 100000, step_ms: 4}}
  - {id: s2, model: demo, engine: scripted, node: any, speed: {prefill_tps: 100000, step_ms: 4}}
  - {id: wide, model: real, node: any, tp: 2, pp: 2, resources: {cpus: 0.5, gpus: 4}, python: %s}
  - {id: late, model: demo, engine: scripted, node: large, speed: {prefill_tps: 100000, step_ms: 4}}
"""
# Stands for vLLM across hosts, which takes GPUs: finds the reserved cards as the engine does, and serves nothing.
WIDE = """
import json, os, sys, time
from ray.util.placement_group import placement_group_table
from services.llm.engines.vllm_ray import reserved_group
group = reserved_group(os.environ)
nodes = placement_group_table(group)["bundles_to_node_id"]
told = {"bundles": group.bundle_specs, "nodes": [nodes[n] for n in sorted(nodes)], "argv": sys.argv}
print("WIDE " + json.dumps(told), flush=True)
with open(sys.argv[sys.argv.index("--ready-file") + 1], "w") as ready:
    ready.write(json.dumps({"pid": os.getpid(), "address": "127.0.0.1:1"}))
time.sleep(1000)
"""
ELASTIC = """
version: 1
models: [{id: slow, kind: llm}]
instances:
  - {id: slow, model: slow, engine: scripted, min: 1, max: 2, speed: {prefill_tps: 100, step_ms: 1}, max_running: 4}
"""
WORDS = 150


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as made:
        made.start(HEAD, 3, 2, '{"device:box": 3}')
        made.start(OTHER, 3, 2, '{"device:box": 3}')
        yield made


def host(mesh: Up, id: str) -> str:
    """Where an instance stands, once it is ready."""
    child = mesh.child(id)
    return str(child.get("address", "")).rpartition(":")[0] if child.get("state") == "ready" else ""


def end(mesh: Up, cluster: RayCluster) -> None:
    """It ends well, and what it wrote on the node is gone."""
    mesh.signal(signal.SIGTERM)
    assert mesh.process.wait(60) == 0 and mesh.left() == []
    assert not list(cluster.tmp(HEAD).glob("infermesh-*"))


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


def test_a_class_grows_as_the_gateway_wants(tmp_path: Path, cluster: RayCluster) -> None:
    with up(tmp_path, ELASTIC, "--ray", cluster.head, "--grace-s", "2") as mesh:
        wait_for(lambda: mesh.is_ready("gateway", "slow"), 90)

        async def overload() -> None:
            async with AsyncClient(mesh.run_file()["gateway"]) as client:
                asked = [client.chat(f"{n} " + "word " * 300, model="slow", max_tokens=2) for n in range(40)]
                tasks = [asyncio.create_task(one) for one in asked]
                await asyncio.to_thread(wait_for, lambda: mesh.is_ready("slow", "slow-2"), 90)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(overload())
        assert "[slow] 1 -> 2 replicas, as the gateway wants" in mesh.errors()
        assert {host(mesh, "slow"), host(mesh, "slow-2")} == {HEAD, OTHER}
        end(mesh, cluster)


def test_an_instance_of_a_dead_node_comes_back_on_another_one(tmp_path: Path, cluster: RayCluster) -> None:
    (tmp_path / "wide.py").write_text(WIDE)
    python = wrapper(tmp_path, f'#!/bin/sh\nexec {sys.executable} {tmp_path / "wide.py"} "$@"\n')
    with up(tmp_path, FLEET % python, "--ray", cluster.head, "--grace-s", "5") as mesh:
        wait_for(lambda: mesh.is_ready("gateway", "s1", "s2", "wide"), 90)
        assert {host(mesh, "s1"), host(mesh, "s2")} == {HEAD, OTHER}, "two of one model stand apart"
        wait_for(lambda: "The mesh is up." in (tmp_path / "stdout").read_text())
        assert "late  pending: needs a host with device:H20-96G" in (tmp_path / "stdout").read_text()
        assert "ray start --address=… --resources='{\"device:H20-96G\": 1}'" in mesh.errors()
        pipeline_over_two_hosts((tmp_path / ".infermesh/logs/wide.log").read_text())
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
        assert f"[{victim}] ended with exit code 75" in mesh.errors()
        end(mesh, cluster)


def pipeline_over_two_hosts(log: str) -> None:
    """The engine found the very cards that were reserved: one each, whole stages on each of two hosts."""
    told: dict[str, Any] = json.loads(next(line for line in log.splitlines() if line.startswith("WIDE "))[5:])
    service, *cards = told["bundles"]
    assert service == {"CPU": 0.5} and cards == [{"GPU": 1.0, "device:box": 1.0}] * 4
    first, *nodes = told["nodes"]
    assert nodes[0] == nodes[1] == first and nodes[2] == nodes[3] != first
    assert 'distributed_executor_backend="ray"' in told["argv"]
