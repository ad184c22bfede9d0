"""One mesh on this host, from its plan to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.fleet import Fault, Fleet, FleetError, Instance, unserved
from deploy.launch import logs, run_file, sessions
from deploy.launch.commands import (
    Command,
    Host,
    Shared,
    gateway_command,
    instance_command,
    of_this_host,
    start_faults,
)
from deploy.launch.host import bind_fault
from deploy.launch.screen import Screen
from deploy.launch.supervise import Policy, State
from deploy.launch.supervisor import LOOK_S, Program, Running, Supervisor
from deploy.model_files import read_models
from deploy.planner.catalogue import shipped
from deploy.planner.estimate import estimates

GATEWAY = "gateway"
DEFAULT_GRPC = "127.0.0.1:50050"  # where client verbs look
HARD_GRACE_S = 5.0  # what a child gets beyond the grace period that it knows of


@dataclass(frozen=True, slots=True)
class Where:
    """Where the mesh listens. `registry` empty: hosted here. `node`: which of the fleet's this host is. `keys`: callers
    need one.
    """

    grpc: str
    http: str
    registry: str = ""
    node: str = ""
    keys: bool = False


async def run_mesh(
    fleet: Fleet,
    host: Host,
    shared: Shared,
    where: Where,
    notes: Sequence[str],
    hosted: Callable[[], AbstractAsyncContextManager[str]],
) -> int:
    """Runs the mesh until it is told to stop. `hosted` opens the embedded registry in this process.

    Raises:
        ValueError: the fleet cannot be started as it is; nothing has been started then.
    """
    instances = check(fleet, where, host)
    stop, hard = _signals()
    screen = Screen()
    for note in notes:
        screen.say(f"infermesh: {note}")
    async with AsyncExitStack() as stack:
        registry = where.registry or f"mesh://{await stack.enter_async_context(hosted())}"
        shared = replace(shared, registry=registry)
        programs = _programs(fleet, instances, host, shared, where)
        policy = Policy(grace_s=shared.grace_s + HARD_GRACE_S)
        supervisor = Supervisor(programs, policy, screen.changed)
        screen.begin()
        try:
            await supervisor.start()
            code = await _watch(supervisor, screen, fleet, where, registry, notes, stop)
        finally:
            screen.end()
            if supervisor.children:
                screen.say("infermesh: stopping; Ctrl-C again ends it at once")
            await supervisor.stop(hard)
            for path in (run_file.RUN_FILE, *(program.ready_file for program in programs)):
                path.unlink(missing_ok=True)
    return code


def check(fleet: Fleet, where: Where, host: Host) -> tuple[Instance, ...]:
    """What is to be started here.

    Raises:
        ValueError: every reason why it cannot be, a line each.
    """
    other = run_file.read_run_file()
    if other is not None:
        raise ValueError(f"a mesh runs in this folder already (pid {other.pid}): stop it, or start in another folder")
    faults = [*unserved(fleet), *start_faults(fleet, host.gpus)]
    for index, model in enumerate(fleet.models):
        path = Path(model.source).expanduser()
        if model.source.startswith(("/", "./", "../", "~")) and not path.exists():
            faults.append(Fault(f"models[{index}].source", f"{model.source} is not there"))
    if faults:
        raise FleetError("fleet", faults)
    taken = []
    for name, address, option in (("gRPC", where.grpc, "--grpc"), ("REST", where.http, "-p PORT or --http")):
        if fault := bind_fault(address):
            taken.append(f"{name} cannot listen on {address}: {fault}; choose another one with {option}")
    if taken:
        raise ValueError("\n".join(taken))
    return of_this_host(fleet, where.node)


def _programs(fleet: Fleet, instances: Sequence[Instance], host: Host, shared: Shared, where: Where) -> list[Program]:
    def ready(id: str) -> Path:
        return run_file.READY / f"{id}.json"

    gateway = gateway_command(fleet, host, shared, grpc=where.grpc, http=where.http, ready_file=ready(GATEWAY))
    commands = [(GATEWAY, GATEWAY, gateway)]
    reckoned = estimates(fleet, read_models(fleet, Path()).shapes, shipped())
    for item in instances:
        speed = reckoned[item.id].speed_values() if item.id in reckoned else {}
        made = instance_command(fleet, item, host, shared, ready(item.id), speed)
        commands.append((item.id, fleet.model(item.model).kind, made))
    return [_program(id, kind, made, ready(id)) for id, kind, made in commands]


def _program(id: str, kind: str, made: Command, ready: Path) -> Program:
    if shutil.which(made.argv[0]) is None:
        raise ValueError(
            f"{id}: its interpreter {made.argv[0]} is not there or cannot be run; see `python:` in the fleet"
        )
    for path, text in made.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    log = run_file.LOGS / f"{id}.log"
    logs.rotate(log)
    # The gateway goes first: it lets what is running finish, for which it needs the instances.
    return Program(id, kind, made.argv, made.env, log, ready, tier=0 if kind == GATEWAY else 1)


async def _watch(
    supervisor: Supervisor,
    screen: Screen,
    fleet: Fleet,
    where: Where,
    registry: str,
    notes: Sequence[str],
    stop: asyncio.Event,
) -> int:
    """Looks after the children until it is told to stop, or there is nothing left worth looking after."""
    told, before = False, None
    while not stop.is_set():
        await supervisor.look()
        children = list(supervisor.children.values())
        now = _run(children, where, registry)
        if now != before:
            run_file.write_run_file(now)
            before = now
        states = {running.program.id: running.child.state for running in children}
        of_instances = [state for id, state in states.items() if id != GATEWAY]
        if states[GATEWAY] is State.FAILED or all(state is State.FAILED for state in of_instances):
            screen.end()
            screen.say("infermesh: the mesh cannot run; see above for the reason")
            return 1
        if not told:
            screen.refresh(children)
            loaded = all(state in (State.READY, State.FAILED, State.STOPPED) for state in of_instances)
            if states[GATEWAY] is State.READY and loaded and State.READY in of_instances:
                told = True
                screen.end()
                print(banner(fleet, children, where, registry, notes), flush=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await stop.wait()
    return 0


def _run(children: Sequence[Running], where: Where, registry: str) -> run_file.Run:
    lines = tuple(
        run_file.ChildLine(r.program.id, r.program.kind, r.pid, r.address, str(r.program.log), r.child.state.value)
        for r in children
    )
    grpc, http = _doors(children, where)
    return run_file.Run(os.getpid(), sessions.born(os.getpid()), grpc, http, registry, lines)


def _doors(children: Sequence[Running], where: Where) -> tuple[str, str]:
    """The gateway's addresses; it knows them best when it was given port 0."""
    facts = next(running.facts for running in children if running.program.id == GATEWAY)
    return facts.get("address") or where.grpc, facts.get("http") or where.http


def banner(fleet: Fleet, children: Sequence[Running], where: Where, registry: str, notes: Sequence[str] = ()) -> str:
    """Addresses, models, and something to paste."""
    grpc, http = _doors(children, where)
    lines = ["", "The mesh is up.", f"  gRPC      {grpc}", f"  REST      http://{http}/v1"]
    lines += [f"  registry  {registry}", "  models"]
    models = {item.id: item.model for item in fleet.instances}
    width = max(len(models[r.program.id]) for r in children if r.program.id in models)
    for running in children:
        if running.program.id in models:
            state = running.address if running.child.state is State.READY else running.child.state.value
            model = models[running.program.id].ljust(width)
            lines.append(f"    {model}  {running.program.kind:9}  {running.program.id}  {state}")
    ready = [r for r in children if r.child.state is State.READY and r.program.id in models]
    first = next((r for r in ready if r.program.kind == "llm"), ready[0])
    lines += [
        "",
        "Try:",
        f"  {curl(first.program.kind, models[first.program.id], http, keys=where.keys)}",
        *([] if grpc == DEFAULT_GRPC else [f"  export INFERMESH_GATEWAY={grpc}   # for infermesh chat and the like"]),
        "",
        *notes,
        *([""] if notes else []),
        "Ctrl-C stops it.",
        "",
    ]
    return "\n".join(lines)


def curl(kind: str, model: str, http: str, *, keys: bool = False) -> str:
    """A line to paste on this machine. The key itself is not known here, only its hash."""
    path, body = {
        "llm": (
            "chat/completions",
            f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}',
        ),
        "embedding": ("embeddings", f'{{"model": "{model}", "input": ["The cat sat on the mat."]}}'),
        "rerank": ("rerank", f'{{"model": "{model}", "query": "a pet", "documents": ["A cat.", "A car."]}}'),
    }[kind]
    host, _, port = http.rpartition(":")
    near = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    key = ' -H "authorization: Bearer $KEY"' if keys else ""
    return f"curl http://{near}:{port}/v1/{path}{key} -H 'content-type: application/json' -d '{body}'"


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """(stop, stop at once): the first and the second of SIGINT, SIGTERM or SIGHUP."""
    stop, hard = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (hard if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, told)
    return stop, hard
