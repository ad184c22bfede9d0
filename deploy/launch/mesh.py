"""One mesh on this host, from its plan to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path

from deploy.fleet import Fault, Fleet, FleetError, Instance, unserved
from deploy.fleet.values import RayCluster
from deploy.launch import run_file, sessions
from deploy.launch.commands import Host, Shared, of_this_host, start_faults
from deploy.launch.host import bind_fault
from deploy.launch.on_ray.need import clusters, ray_faults, ray_remarks
from deploy.launch.on_ray.survey import reach_faults, remarks, survey
from deploy.launch.programs import GATEWAY, Programs, place_of, reckoned_speeds
from deploy.launch.replicas import Replicas, at_start, replica_faults
from deploy.launch.scaling import followed
from deploy.launch.screen import Screen
from deploy.launch.supervise import Policy, State
from deploy.launch.supervisor import LOOK_S, Running, Supervisor

DEFAULT_GRPC = "127.0.0.1:50050"  # where client verbs look
LOADED = (State.READY, State.FAILED, State.STOPPED)  # and nothing more to wait for
HARD_GRACE_S = 5.0  # what a child gets beyond the grace period that it knows of


@dataclass(frozen=True, slots=True)
class Where:
    """Where the mesh listens. `registry` empty: hosted here, at `registry_listen`. `node`: which of the fleet's this
    host is. `keys`: callers need one. `ray`: HOST:PORT of a Ray head, or a cluster's name in the fleet.
    `tls`: the files of a certificate and of its key, for the gateway's doors; None = in the clear.
    """

    grpc: str
    http: str
    registry: str = ""
    node: str = ""
    keys: bool = False
    ray: str = ""
    registry_listen: str = "127.0.0.1:0"
    tls: tuple[str, str] | None = None


async def run_mesh(
    fleet: Fleet,
    host: Host,
    shared: Shared,
    where: Where,
    notes: Sequence[str],
    hosted: Callable[[], AbstractAsyncContextManager[str]],
    wanted: Callable[[str], Awaitable[Mapping[str, int]]],
) -> int:
    """Runs the mesh until it is told to stop. `hosted` opens the embedded registry in this process; `wanted` asks the
    gateway at an address how many replicas there should be.

    Raises:
        ValueError: the fleet cannot be started as it is; nothing has been started then.
    """
    found = clusters(fleet, where.ray)
    instances = check(fleet, where, host, found)
    stop, hard = _signals()
    screen = Screen()
    for note in notes:
        screen.say(f"infermesh: {note}")
    if found:
        for note in await _surveyed(fleet, instances, host, shared, where, found):
            screen.say(f"infermesh: {note}")
    async with AsyncExitStack() as stack:
        registry = where.registry or f"mesh://{await stack.enter_async_context(hosted())}"
        shared = replace(shared, registry=registry)
        programs = Programs(fleet, host, shared, found, reckoned_speeds(fleet))
        started = [
            programs.gateway(where.grpc, where.http, where.tls),
            *starmap(programs.instance, at_start(instances)),
        ]
        policy = Policy(grace_s=shared.grace_s + HARD_GRACE_S)
        supervisor = Supervisor(started, policy, screen.changed)
        replicas = Replicas({item.id: item for item in instances}, supervisor, programs.instance)

        async def asked() -> Mapping[str, int]:
            gateway = supervisor.children[GATEWAY]
            return await wanted(gateway.address or where.grpc) if gateway.child.state is State.READY else {}

        screen.begin()
        try:
            await supervisor.start()
            async with followed(replicas, asked, screen.say):
                code = await _watch(supervisor, screen, where, registry, notes, stop)
        finally:
            screen.end()
            if supervisor.children:
                screen.say("infermesh: stopping; Ctrl-C again ends it at once")
            await supervisor.stop(hard)
            run_file.RUN_FILE.unlink(missing_ok=True)
            for folder in (run_file.READY, run_file.RAY):
                shutil.rmtree(folder, ignore_errors=True)
    return code


def check(fleet: Fleet, where: Where, host: Host, found: tuple[RayCluster, ...] = ()) -> tuple[Instance, ...]:
    """What is to be started here, or on these Ray clusters.

    Raises:
        ValueError: every reason why it cannot be, a line each.
    """
    other = run_file.read_run_file()
    if other is not None:
        raise ValueError(f"a mesh runs in this folder already (pid {other.pid}): stop it, or start in another folder")
    if found:
        faults = [*unserved(fleet, "ray"), *start_faults(fleet, ray=True), *ray_faults(fleet, found)]
        faults += replica_faults(fleet)
    else:
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
    return fleet.instances if found else of_this_host(fleet, where.node)


async def _surveyed(
    fleet: Fleet,
    instances: Sequence[Instance],
    host: Host,
    shared: Shared,
    where: Where,
    found: tuple[RayCluster, ...],
) -> list[str]:
    """What the operator should know of the clusters.

    Raises:
        ValueError: why they cannot be used.
    """
    wanted = {item.id: place_of(fleet, item, found) for item in instances}
    used = {cluster.name for cluster, _ in wanted.values()}
    views = await survey(host.python, [cluster for cluster in found if cluster.name in used])
    listens = "" if where.registry else where.registry_listen
    faults = list(reach_faults(views, listens, where.grpc, closed=where.keys or shared.insecure))
    if faults:
        raise ValueError("\n".join(faults))
    return [*ray_remarks(fleet), *remarks(views, wanted)]


async def _watch(
    supervisor: Supervisor,
    screen: Screen,
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
        screen.refresh(children)
        if not told:
            loaded = all(r.child.state in LOADED or r.pending for r in children)
            if states[GATEWAY] is State.READY and loaded and State.READY in of_instances:
                told = True
                screen.end()
                print(banner(children, where, registry, notes), flush=True)
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


def banner(children: Sequence[Running], where: Where, registry: str, notes: Sequence[str] = ()) -> str:
    """Addresses, models, and something to paste."""
    grpc, http = _doors(children, where)
    if where.tls is not None:
        grpc = f"grpcs://{grpc}"
    rest = f"http://{http}" if where.tls is None else f"https://{http}"
    instances = [running for running in children if running.program.model]
    failed = [running for running in instances if running.child.state is State.FAILED]
    lines = ["", "The mesh is up." if not failed else "The mesh is up, in part:"]
    lines += [f"  {running.program.id} failed, see {running.program.log}" for running in failed]
    lines += [f"  gRPC      {grpc}", f"  REST      {rest}/v1", f"  registry  {registry}", "  models"]
    width = max(len(running.program.model) for running in instances)
    for running in instances:
        state = running.address if running.child.state is State.READY else running.child.state.value
        if running.pending:
            state = f"pending: {running.pending}"
        lines.append(
            f"    {running.program.model.ljust(width)}  {running.program.kind:9}  {running.program.id}  {state}"
        )
    ready = [running for running in instances if running.child.state is State.READY]
    first = next((r for r in ready if r.program.kind == "llm"), ready[0])
    lines += [
        "",
        "Try:",
        f"  {curl(first.program.kind, first.program.model, rest, keys=where.keys)}",
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
    scheme, _, address = http.rpartition("://")
    host, _, port = address.rpartition(":")
    near = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    key = ' -H "authorization: Bearer $KEY"' if keys else ""
    return f"curl {scheme or 'http'}://{near}:{port}/v1/{path}{key} -H 'content-type: application/json' -d '{body}'"


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """(stop, stop at once): the first and the second of SIGINT, SIGTERM or SIGHUP."""
    stop, hard = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (hard if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, told)
    return stop, hard
