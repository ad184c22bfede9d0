"""Runs children as `supervise` says: spawns them in sessions of their own, watches them, sweeps up after them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.launch import sessions, supervise
from deploy.launch.supervise import Child, Effect, Policy, State

LOOK_S = 0.1  # how often children are looked at
CANNOT_START = 126  # the exit code that a shell gives what it cannot run


@dataclass(frozen=True, slots=True)
class Program:
    """How to start one child. `tier` orders the end: lower ones are stopped first. `ready_file` is written by the child
    when it serves: {"pid", "address"}; until then it may say what it waits for: {"pid", "pending"}.
    """

    id: str
    kind: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path
    ready_file: Path
    tier: int = 1
    model: str = ""


@dataclass(slots=True)
class Running:
    """A program and its present life."""

    program: Program
    child: Child
    process: subprocess.Popen[bytes] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)  # what it told when it became ready
    sweeping: asyncio.Task[None] | None = None
    leaving: bool = False  # it was taken out of the mesh, and is forgotten when it has ended

    @property
    def pending(self) -> str:
        """What it waits for before it can start; empty: nothing."""
        return self.facts.get("pending", "")

    @property
    def address(self) -> str:
        return self.facts.get("address", "")

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0


Changed = Callable[[Running], None]


@dataclass(slots=True)
class Supervisor:
    """`changed` is called after every change of a child's state. `spawn` and the clock are arguments for tests."""

    programs: Sequence[Program]
    policy: Policy
    changed: Changed
    clock: Callable[[], float] = time.monotonic
    children: dict[str, Running] = field(default_factory=dict)
    _guard: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Starts all of them."""
        self._guard = _start_guard(self.policy.grace_s)
        for program in self.programs:
            await self.add(program)

    async def add(self, program: Program) -> None:
        """Starts one more."""
        child, effects = supervise.begin(program.id, self.clock())
        running = self.children[program.id] = Running(program, child)
        await self._carry_out(running, effects)
        self.changed(running)

    async def remove(self, id: str) -> None:
        """Tells it to finish and go; rounds of `look` see to the rest. It is forgotten when its session is empty."""
        running = self.children[id]
        running.leaving = True
        await self._step(running, supervise.stop(running.child, self.clock()))

    async def look(self) -> None:
        """One round: who has died, who has become ready, whose time has come."""
        for running in list(self.children.values()):
            if running.sweeping is not None:
                if not running.sweeping.done():
                    continue  # nothing new is started while the dead one's engine may still hold its memory
                running.sweeping = None
                if running.child.state in (State.BACKOFF, State.FAILED, State.STOPPED):
                    running.process = None
            if running.leaving and running.child.settled:
                del self.children[running.program.id]
                continue
            now = self.clock()
            code = running.process.poll() if running.process else None
            if running.process is not None and code is not None:
                await self._step(running, supervise.exited(running.child, code, now, self.policy))
            elif running.child.state is State.STARTING:
                running.facts = _ready(running)
                if running.facts and not running.pending:
                    await self._step(running, supervise.ready(running.child, now))
            else:
                await self._step(running, supervise.tick(running.child, now, self.policy))

    async def stop(self, hard: asyncio.Event) -> None:
        """Stops the children tier by tier; `hard` cuts the waiting short. Returns when every session is empty."""
        for tier in sorted({running.program.tier for running in self.children.values()}):
            for running in self._of(tier):
                await self._step(running, supervise.stop(running.child, self.clock(), hard=hard.is_set()))
            told = hard.is_set()
            while any(not r.child.settled or r.sweeping is not None for r in self._of(tier)):
                if hard.is_set() and not told:
                    told = True
                    for running in self._of(tier):
                        await self._step(running, supervise.stop(running.child, self.clock(), hard=True))
                await asyncio.sleep(LOOK_S / 2)
                await self.look()
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            await asyncio.to_thread(self._guard.wait)

    def _of(self, tier: int) -> list[Running]:
        return [running for running in self.children.values() if running.program.tier == tier]

    async def _step(self, running: Running, step: supervise.Step) -> None:
        before = running.child.state
        running.child, effects = step
        await self._carry_out(running, effects)
        if running.child.state is not before:
            self.changed(running)

    async def _carry_out(self, running: Running, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if effect is Effect.START:
                try:
                    self._spawn(running)
                except OSError as error:  # no memory for a process, no disk for its log, a broken interpreter
                    print(f"[{running.program.id}] cannot be started: {error}", file=sys.stderr)
                    running.child, _ = supervise.exited(running.child, CANNOT_START, self.clock(), self.policy)
            elif effect is Effect.TERMINATE:
                sessions.terminate(running.pid)
            else:
                running.sweeping = asyncio.create_task(self._sweep(running))

    def _spawn(self, running: Running) -> None:
        program = running.program
        for folder in (program.ready_file.parent, program.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        program.ready_file.unlink(missing_ok=True)
        running.facts = {}
        with program.log.open("ab") as log:
            # No preexec_fn: it would fork the interpreter, with grpc's threads in it, instead of vfork + exec.
            running.process = subprocess.Popen(
                program.argv,
                env=dict(program.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._tell_guard("+", running.pid)

    async def _sweep(self, running: Running) -> None:
        """Empties the child's session; afterwards its number is nobody's."""
        pid, process = running.pid, running.process
        if process is None:
            return
        left = await asyncio.to_thread(sessions.sweep, pid)
        await asyncio.to_thread(process.wait)
        if left:
            print(f"[{running.program.id}] processes that would not die: {left}", file=sys.stderr)
        self._tell_guard("-", pid)

    def _tell_guard(self, sign: str, pid: int) -> None:
        if self._guard is None or self._guard.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(f"{sign}{pid}\n".encode())
            self._guard.stdin.flush()


def _ready(running: Running) -> dict[str, str]:
    """What the ready file says, once this very process has written it."""
    try:
        told = json.loads(running.program.ready_file.read_text())
    except (OSError, ValueError):
        return {}
    return {key: str(value) for key, value in told.items()} if told.get("pid") == running.pid else {}


def _start_guard(grace_s: float) -> subprocess.Popen[bytes]:
    path = os.path.join(os.path.dirname(__file__), "guard.py")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", path, str(grace_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
