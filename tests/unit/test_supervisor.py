"""The shell around the supervisor's decisions, with real processes that are no services."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from deploy.launch import mesh, sessions
from deploy.launch.screen import Screen
from deploy.launch.supervise import Policy, State
from deploy.launch.supervisor import Program, Running, Supervisor


def _forever(id: str, folder: Path, tier: int = 1, told_pid: str = "os.getpid()") -> Program:
    """A program that says at once that it serves, and then does nothing."""
    ready = folder / f"{id}.json"
    told = f"open({str(ready)!r}, 'w').write(json.dumps({{'pid': {told_pid}, 'address': 'x:1'}}))"
    argv = (sys.executable, "-c", f"import json, os, time; {told}; time.sleep(100)")
    return Program(id, "llm", argv, os.environ, folder / f"{id}.log", ready, tier)


async def test_supervisor_restarts_sweeps_and_stops(tmp_path: Path) -> None:
    """One life after the other."""
    ready = tmp_path / "a.json"
    script = (
        "import json, os, subprocess, time; subprocess.Popen(['sleep', '100'])\n"
        f"open({str(ready)!r}, 'w').write(json.dumps({{'pid': os.getpid(), 'address': 'x:1'}})); time.sleep(100)"
    )
    argv = (sys.executable, "-c", script)
    program = Program("a", "llm", argv, os.environ, tmp_path / "a.log", ready)
    seen: list[State] = []

    def changed(running: Running) -> None:
        seen.append(running.child.state)

    supervisor = Supervisor([program], Policy(first_s=0.1, grace_s=5), changed)
    await supervisor.start()
    running = supervisor.children["a"]

    async def until(state: State, restarts: int = 0) -> None:
        async with asyncio.timeout(20):
            while running.child.state is not state or running.child.restarts != restarts:
                await supervisor.look()
                await asyncio.sleep(0.02)

    await until(State.READY)
    first = running.pid
    assert running.address == "x:1" and len(sessions.members(first)) == 2
    os.kill(first, signal.SIGKILL)
    await until(State.READY, restarts=1)
    assert running.pid != first and sessions.members(first) == []
    last = running.pid
    await supervisor.stop(asyncio.Event())
    assert sessions.members(last) == [] and running.child.state is State.STOPPED
    assert seen == [
        State.STARTING,
        State.READY,
        State.BACKOFF,
        State.STARTING,
        State.READY,
        State.STOPPING,
        State.STOPPED,
    ]


async def test_what_cannot_be_started_is_given_up_and_hurts_nobody_else(tmp_path: Path) -> None:
    """The folder of the logs has gone, the program is none: both are a child's trouble, not the mesh's."""
    ready = tmp_path / "none.json"
    homeless = Program(
        "homeless", "llm", (sys.executable, "-c", "import time; time.sleep(100)"), {}, tmp_path / "l/x.log", ready
    )
    broken = Program("broken", "llm", (str(tmp_path),), {}, tmp_path / "b.log", ready)
    supervisor = Supervisor([broken, homeless], Policy(first_s=0.01, grace_s=5), lambda running: None)
    await supervisor.start()
    async with asyncio.timeout(20):
        while supervisor.children["broken"].child.state is not State.FAILED:
            await supervisor.look()
            await asyncio.sleep(0.01)
    pid = supervisor.children["homeless"].pid
    assert sessions.members(pid) == [pid] and (tmp_path / "l/x.log").exists()
    async with asyncio.timeout(20):
        await supervisor.stop(asyncio.Event())
    assert sessions.members(pid) == []


async def test_looking_after_a_mesh_leaves_nothing_behind_and_tells_of_one_that_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours of looking must not pile up tasks; the banner does not wait for an instance that was drained meanwhile."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mesh, "LOOK_S", 0.01)

    def program(id: str, script: str) -> Program:
        ready = tmp_path / f"{id}.json"
        told = f"import json, os, time; open({str(ready)!r}, 'w').write(json.dumps({{'pid': os.getpid()}}))\n"
        text = script or told + "time.sleep(100)"
        model = "" if id == "gateway" else "m"
        return Program(id, "llm", (sys.executable, "-c", text), os.environ, tmp_path / f"{id}.log", ready, 1, model)

    programs = [program("gateway", ""), program("a", ""), program("b", "pass")]
    supervisor = Supervisor(programs, Policy(grace_s=5), lambda running: None)
    await supervisor.start()
    stop = asyncio.Event()
    where = mesh.Where("127.0.0.1:1", "127.0.0.1:2")
    watching = asyncio.create_task(mesh._watch(supervisor, Screen(), where, "mesh://x:1", (), stop))
    printed = ""
    async with asyncio.timeout(20):
        while "The mesh is up." not in printed:
            printed += capsys.readouterr().out
            await asyncio.sleep(0.02)
    assert "b  stopped" in printed
    before = len(asyncio.all_tasks())
    await asyncio.sleep(0.5)
    assert len(asyncio.all_tasks()) <= before + 1
    stop.set()
    assert await asyncio.wait_for(watching, 20) == 0
    await supervisor.stop(asyncio.Event())


async def test_the_gateway_ends_before_its_instances_are_told_to(tmp_path: Path) -> None:
    seen: list[tuple[str, State]] = []

    def changed(running: Running) -> None:
        seen.append((running.program.id, running.child.state))

    supervisor = Supervisor([_forever("llm", tmp_path), _forever("gateway", tmp_path, tier=0)], Policy(), changed)
    await supervisor.start()
    async with asyncio.timeout(20):
        while seen.count(("llm", State.READY)) + seen.count(("gateway", State.READY)) < 2:
            await supervisor.look()
            await asyncio.sleep(0.02)
    await supervisor.stop(asyncio.Event())
    assert seen[-4:] == [
        *(("gateway", State.STOPPING), ("gateway", State.STOPPED)),
        *(("llm", State.STOPPING), ("llm", State.STOPPED)),
    ]


async def test_only_the_present_life_can_say_that_it_serves(tmp_path: Path) -> None:
    program = _forever("a", tmp_path, told_pid="1")
    supervisor = Supervisor([program], Policy(), lambda running: None)
    await supervisor.start()
    async with asyncio.timeout(20):
        while not program.ready_file.exists() or not program.ready_file.read_text():
            await supervisor.look()
            await asyncio.sleep(0.02)
    await supervisor.look()
    assert supervisor.children["a"].child.state is State.STARTING
    await supervisor.stop(asyncio.Event())


async def test_nothing_is_started_before_the_dead_one_is_swept_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine may still hold the card's memory."""
    swept, sweep = threading.Event(), sessions.sweep

    def slow(leader: int, timeout_s: float = 5.0) -> list[int]:
        swept.wait(20)
        return sweep(leader, timeout_s)

    monkeypatch.setattr(sessions, "sweep", slow)
    supervisor = Supervisor([_forever("a", tmp_path)], Policy(first_s=0.01), lambda running: None)
    await supervisor.start()
    running = supervisor.children["a"]
    first = running.pid

    async def until(state: State) -> None:
        async with asyncio.timeout(20):
            while running.child.state is not state:
                await supervisor.look()
                await asyncio.sleep(0.02)

    await until(State.READY)
    os.kill(first, signal.SIGKILL)
    await until(State.BACKOFF)
    for _ in range(10):
        await supervisor.look()
        await asyncio.sleep(0.02)
    assert running.child.state is State.BACKOFF and running.pid == first
    swept.set()
    await until(State.READY)
    assert running.pid != first and running.child.restarts == 1
    await supervisor.stop(asyncio.Event())
