"""Classes of instances that grow and shrink while they run: real processes, no Ray."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from deploy.fleet import Fleet, Instance
from deploy.fleet.values import Telemetry
from deploy.launch.replicas import Replicas, at_start, replica_faults
from deploy.launch.supervise import Policy, State
from deploy.launch.supervisor import LOOK_S, Program, Supervisor

# Serves at once; on SIGTERM it finishes what it is doing, and says so.
SERVES = """
import json, os, signal, sys, time
def leave(*_):
    time.sleep(0.3)
    open(sys.argv[1] + ".drained", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
open(sys.argv[1], "w").write(json.dumps({"pid": os.getpid(), "address": "x"}))
time.sleep(100)
"""


def classes(**bounds: int) -> Fleet:
    instances = ({"id": "a", "model": "m", **bounds}, {"id": "b", "model": "m"})
    return Fleet.model_validate({"version": 1, "models": ({"id": "m", "kind": "llm"},), "instances": instances})


def test_replicas_have_names_of_their_own() -> None:
    started = [(item.id, group) for item, group in at_start(classes(min=2, max=3).instances)]
    assert started == [("a", "a"), ("a-2", "a"), ("b", "")]
    assert [group for _, group in at_start(classes(min=2).instances)] == ["", "", ""], "one size only"
    fleet = classes(min=1, max=3)
    taken = fleet.model_copy(update={"instances": (*fleet.instances, Instance(id="a-3", model="m"))})
    assert [str(fault) for fault in replica_faults(taken)] == [
        "instances[0].max: its replica 3 would be 'a-3', which is there"
    ]
    assert list(replica_faults(fleet)) == []
    hidden = fleet.instances[0].model_copy(update={"telemetry": Telemetry(enable=False)})
    (fault,) = replica_faults(fleet.model_copy(update={"instances": (hidden,)}))
    assert fault.path == "instances[0].telemetry"


async def test_a_class_grows_and_drains(tmp_path: Path) -> None:
    fleet = classes(min=1, max=3)

    def program(instance: Instance, group: str) -> Program:
        ready = tmp_path / f"{instance.id}.json"
        argv = (sys.executable, "-c", SERVES, str(ready))
        return Program(instance.id, "llm", argv, {}, tmp_path / f"{instance.id}.log", ready, model="m")

    supervisor = Supervisor([program(*item) for item in at_start(fleet.instances)], Policy(), lambda running: None)
    replicas = Replicas({item.id: item for item in fleet.instances}, supervisor, program)

    async def until_all(*ids: str) -> None:
        async with asyncio.timeout(30):
            while {id for id, r in supervisor.children.items() if r.child.state is State.READY} != set(ids) or len(
                supervisor.children
            ) != len(ids):
                await supervisor.look()
                await asyncio.sleep(LOOK_S / 5)

    await supervisor.start()
    try:
        await until_all("a", "b")
        assert await replicas.set("a", 9) == 3 == replicas.count("a"), "max holds"
        await until_all("a", "a-2", "a-3", "b")
        assert await replicas.set("a", 2) == 2
        leaving = supervisor.children["a-3"]
        assert leaving.child.state is State.STOPPING and not (tmp_path / "a-3.json.drained").exists()
        # Wanted again before it has left: another one comes, the one that leaves is left in peace.
        assert await replicas.set("a", 3) == 3
        await until_all("a", "a-2", "a-4", "b")
        assert (tmp_path / "a-3.json.drained").exists() and leaving.child.exit_code == 0
        assert await replicas.set("a", 0) == 1, "min holds"
        await until_all("a", "b")
        assert await replicas.set("b", 5) == 1, "no max: it stays as it is"
    finally:
        await supervisor.stop(asyncio.Event())
    assert (tmp_path / "a-4.json.drained").exists()
