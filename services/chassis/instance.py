"""The life of a model service: bind -> load -> serve -> register -> (signal) -> drain -> stop.

It answers health, Describe and Link from the first moment; model calls are refused as STARTING until the model is in.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import structlog
from registry.address import open_registry
from registry.presence import advertised

import infermesh
from infermesh.errors import MeshError
from infermesh.v1 import worker_pb2_grpc
from infermesh.v1.worker_pb2 import Load
from registry.endpoint import Endpoint
from registry.port import Registry, RegistryError
from services.chassis.arrivals import Arrivals
from services.chassis.identity import Identity
from services.chassis.keys import Keys, load_keys
from services.chassis.logs import configure_logs
from services.chassis.server import Phase, Server
from services.chassis.settings import InstanceSettings, split_address
from services.chassis.signals import Stop
from services.chassis.worker import Worker

WORKER_SERVICE = "infermesh.v1.WorkerService"
SETTLE_S = (
    0.5  # between leaving the registry and stopping to listen: gateways that have not heard yet are told DRAINING
)
log = structlog.get_logger("instance")


@dataclass(frozen=True, slots=True)
class InstanceContext:
    """What a program is built from."""

    settings: InstanceSettings
    identity: Identity
    arrivals: Arrivals
    keys: Keys


@dataclass(frozen=True, slots=True)
class Program:
    """What one kind of service brings. `died` returns, with the reason, only when the engine cannot be mended."""

    service_names: tuple[str, ...]
    add_services: Callable[[grpc.aio.Server], None]
    start: Callable[[Endpoint, Callable[[str], None]], Awaitable[Endpoint]]
    load: Callable[[], Load]
    died: Callable[[], Awaitable[str]]
    close: Callable[[], Awaitable[None]]


async def run_instance(settings: InstanceSettings, build: Callable[[InstanceContext], Program]) -> int:
    """Runs one instance to its end. Returns the exit code: 0 drained, 1 failed, 2 cannot run as configured."""
    host, port = split_address(settings.listen)
    instance_id = settings.instance_id or f"{settings.kind}-{socket.gethostname()}-{port or os.getpid()}"
    configure_logs(settings.log_level, instance=instance_id, kind=settings.kind)
    try:
        keys = load_keys(settings.keys)
        advertise_host, advertise_port = advertised(settings.advertise, host, settings.registry)
        registry = _registry(settings)
    except (ValueError, RegistryError) as error:
        return _refuse(error)
    stop = Stop()
    identity = Identity(instance_id, secrets.randbits(64), settings.model)
    arrivals = Arrivals()
    program = build(InstanceContext(settings, identity, arrivals, keys))
    server = Server(program.service_names, max_streams=2 * (settings.max_running or 1024) + 64)
    endpoint = settings.draft(instance_id, advertise_host, advertise_port, identity.incarnation)
    worker = Worker(lambda: endpoint, program.load, arrivals, keys, stop.ask)
    program.add_services(server.grpc)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server.grpc)
    try:
        bound = await server.start(settings.listen, [WORKER_SERVICE])
    except OSError as error:
        return _refuse(error)
    stop.listen()
    loading = asyncio.create_task(program.start(endpoint, lambda line: log.info("loading", step=line)))
    code = 1
    try:
        if not await _unless_stopped(loading, stop):
            return 0
        endpoint = dataclasses.replace(
            loading.result(), port=advertise_port or bound, pid=os.getpid(), version=infermesh.__version__
        )
        await server.enter(Phase.SERVING)
        if registry is not None:
            await registry.register(endpoint)
        _ready(settings.ready_file, endpoint, bound)
        log.info("serving", address=endpoint.address, model=endpoint.model, engine=endpoint.engine)
        code = await _until_over(program, stop)
    except (MeshError, RegistryError) as error:
        return _refuse(error)
    finally:
        await _leave(settings, stop, server, worker, registry, arrivals, instance_id, dead=code != 0)
        await program.close()
    log.info("stopped", exit_code=code)
    return code


def _registry(settings: InstanceSettings) -> Registry | None:
    if not settings.registry:
        return None
    key = settings.operator_key_file.read_text().strip() if settings.operator_key_file else ""
    return open_registry(settings.registry, operator_key=key)


def _refuse(error: Exception) -> int:
    """Told to a person on stderr, beside the log: this process cannot run as configured."""
    print(f"infermesh: {error}", file=sys.stderr)
    log.error("cannot run", error=str(error))
    return 2


async def _unless_stopped(loading: asyncio.Task[Endpoint], stop: Stop) -> bool:
    """Waits for the model; False when the process is told to stop first."""
    asked = asyncio.create_task(stop.asked.wait())
    await asyncio.wait({loading, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if loading.done():
        return True
    loading.cancel()
    return False


async def _until_over(program: Program, stop: Stop) -> int:
    died = asyncio.ensure_future(program.died())
    asked = asyncio.create_task(stop.asked.wait())
    await asyncio.wait({died, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not died.done():
        died.cancel()
        return 0
    log.critical("the engine is dead; this process ends", reason=died.result())
    print(f"infermesh: the engine is dead: {died.result()}", file=sys.stderr)
    return 1


async def _leave(
    settings: InstanceSettings,
    stop: Stop,
    server: Server,
    worker: Worker,
    registry: Registry | None,
    arrivals: Arrivals,
    instance_id: str,
    *,
    dead: bool,
) -> None:
    """NOT_SERVING -> out of the registry -> what is running finishes -> the listener closes."""
    grace_s = 0.0 if dead else (settings.grace_s if stop.grace_s is None else stop.grace_s)
    worker.announce_drain(grace_s)
    await server.enter(Phase.DRAINING)
    if registry is not None:
        await registry.deregister(instance_id)
    if not dead:
        await asyncio.sleep(SETTLE_S if arrivals.running or registry is not None else 0)
        if not await arrivals.wait_idle(grace_s):
            log.warning("grace period over", still_running=arrivals.running)
    await server.stop(0.2)
    if registry is not None:
        await registry.close()


def _ready(path: Path | None, endpoint: Endpoint, port: int) -> None:
    """Tells a supervisor, in one atomic step, that this instance serves."""
    if path is None:
        return
    partial = path.with_suffix(".partial")
    facts = {"id": endpoint.id, "address": endpoint.address, "port": port, "pid": os.getpid(), "model": endpoint.model}
    partial.write_text(json.dumps(facts))
    partial.replace(path)
