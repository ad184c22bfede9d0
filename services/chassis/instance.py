"""The life of a model service: bind -> load -> serve -> register -> (signal) -> drain -> stop.

It answers health, Describe and Link from the first moment; model calls are refused as STARTING until the model is in.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import structlog

import infermesh
from deploy.planner.calibration import Calibrations, parse_calibrations, with_speed
from infermesh.errors import MeshError
from infermesh.v1 import worker_pb2_grpc
from infermesh.v1.worker_pb2 import Load
from registry.advertise import advertised
from registry.endpoint import Endpoint
from registry.port import Registry, RegistryError
from registry.presence import Departure, Presence, present
from services.chassis.arrivals import Arrivals
from services.chassis.calibrate import Calibrator
from services.chassis.call_spans import CallSpans
from services.chassis.certificates import Certificate
from services.chassis.held_prefixes import HeldPrefixes
from services.chassis.identity import Identity
from services.chassis.keys import Keys, load_keys
from services.chassis.logs import configure_logs
from services.chassis.passes import Passes
from services.chassis.ready import tell_ready
from services.chassis.registering import connect_registry, operator_key
from services.chassis.server import Phase, Server
from services.chassis.settings import InstanceSettings, split_address
from services.chassis.signals import Stop
from services.chassis.worker import Worker

WORKER_SERVICE = "infermesh.v1.WorkerService"
SETTLE_S = 0.5  # after leaving the registry: gateways that have not heard yet are still told DRAINING
log = structlog.get_logger("instance")


@dataclass(frozen=True, slots=True)
class InstanceContext:
    """What a program is built from."""

    settings: InstanceSettings
    identity: Identity
    arrivals: Arrivals
    keys: Keys
    passes: Passes | None = None
    certificate: Certificate | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """What one kind of service brings. `died` returns, with the reason, only when the engine cannot be mended."""

    service_names: tuple[str, ...]
    add_services: Callable[[grpc.aio.Server], None]
    start: Callable[[Endpoint, Callable[[str], None]], Awaitable[Endpoint]]
    load: Callable[[], Load]
    died: Callable[[], Awaitable[str]]
    close: Callable[[], Awaitable[None]]
    held: HeldPrefixes | None = None  # of services whose engine has a prefix cache
    preempts: Callable[[], bool] = lambda: False  # once started: shorter prompts overtake longer ones


async def run_instance(settings: InstanceSettings, build: Callable[[InstanceContext], Program]) -> int:
    """Runs one instance to its end. Returns the exit code: 0 drained, 1 failed, 2 cannot run as configured."""
    host, port = split_address(settings.listen)
    instance_id = settings.instance_id or f"{settings.kind}-{socket.gethostname()}-{port or os.getpid()}"
    configure_logs(settings.log_level, instance=instance_id, kind=settings.kind)
    try:
        passes = _passes(settings)
        certificate = settings.certificate()
        keys = load_keys(settings.keys, passes)
        address = advertised(settings.advertise, host, settings.registry)
        registry = connect_registry(settings, over_tls=certificate is not None)
        calibrations = read_calibrations(settings.calibration)
    except (ValueError, RegistryError) as error:
        return _refuse(error)
    stop = Stop()
    identity = Identity(instance_id, secrets.randbits(64), settings.model)
    context = InstanceContext(settings, identity, Arrivals(), keys, passes, certificate)
    program = build(context)
    try:
        return await _live(context, program, registry, address, stop, calibrations)
    except (MeshError, RegistryError, OSError) as error:
        return _refuse(error)
    finally:
        await program.close()
        if registry is not None:
            await registry.close()
        log.info("stopped")


async def _live(
    context: InstanceContext,
    program: Program,
    registry: Registry | None,
    address: tuple[str, int],
    stop: Stop,
    calibrations: Calibrations,
) -> int:
    settings, identity = context.settings, context.identity
    endpoint = settings.draft(identity.instance_id, *address, identity.incarnation)
    spans = CallSpans(settings.otlp, settings.otlp_ratio) if settings.otlp else None
    streams = 2 * (settings.max_running or 1024) + 64
    server = Server(program.service_names, max_streams=streams, inner=(spans,) if spans is not None else ())
    presence: Presence | None = None
    bound = 0

    def fit() -> None:
        context.arrivals.room.fit(endpoint, program.load, preempts=program.preempts())

    async def adopt(values: Mapping[str, float]) -> str:
        nonlocal endpoint
        if endpoint.speed.source == "declared":
            return "its operator declared a speed, which stays; take that out of its options or the fleet file"
        endpoint = with_speed(endpoint, values)
        fit()
        if presence is not None:
            await presence.renew(speed=endpoint.speed)
        return ""

    # Over TLS a process is not reached by the name that its certificate is for.
    own = f"unix-abstract:infermesh-{secrets.token_hex(8)}" if context.certificate is not None else ""
    calibrator = Calibrator(lambda: endpoint, context.arrivals, lambda: own or _own_address(settings, bound))
    worker = Worker(
        *(lambda: endpoint, program.load, context.arrivals, context.keys, stop.ask),
        *(program.held, stop.undo, calibrator.run, adopt, program.preempts),
    )
    program.add_services(server.grpc)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server.grpc)
    bound = await server.start(settings.listen, [WORKER_SERVICE], context.certificate, own)
    watching = asyncio.create_task(context.certificate.watch()) if context.certificate is not None else None
    died = asyncio.ensure_future(program.died())
    stop.listen()

    async def serving(yes: bool) -> None:
        if yes:
            worker.retract_drain()
        else:
            worker.announce_drain(_grace_s(settings, stop))
        await server.enter(Phase.SERVING if yes else Phase.DRAINING)

    async def drain(grace_s: float) -> None:
        if died.done():
            return
        idle = asyncio.ensure_future(context.arrivals.wait_idle(_grace_s(settings, stop)))
        if await _first(idle, stop.undone) and not idle.result():
            log.warning("grace period over", still_running=context.arrivals.running)

    try:
        loading = asyncio.ensure_future(program.start(endpoint, lambda line: log.info("loading", step=line)))
        if not await _unless_stopped(loading, stop):
            return 0
        endpoint = dataclasses.replace(
            calibrations.calibrated(loading.result()),
            port=address[1] or bound,
            pid=os.getpid(),
            version=infermesh.__version__,
        )
        if context.passes is not None:
            context.passes.address = endpoint.address
        fit()
        if spans is not None:
            spans.serve(endpoint)
        gc.collect()
        gc.freeze()  # what is loaded stays; a full collection would walk it again and again, with the loop held
        registries = [] if registry is None else [registry]
        departure = Departure(settle_s=SETTLE_S if registries else 0.0)
        while True:
            async with present(registries, endpoint, serving=serving, drain=drain, departure=departure) as presence:
                tell_ready(settings.ready_file, _facts(endpoint, bound))
                log.info("serving", address=endpoint.address, model=endpoint.model, engine=endpoint.engine)
                code = await _until_over(died, stop)
            if code or not stop.resume():
                return code
    finally:
        died.cancel()
        if watching is not None:
            watching.cancel()
        worker.announce_goodbye("stopped")
        await server.stop(0.2)
        if spans is not None:
            await spans.close()


def _passes(settings: InstanceSettings) -> Passes | None:
    """Those that gateways show here.

    Raises:
        ValueError: an instance of a mesh has keys, and nothing to know its gateways by.
    """
    key = operator_key(settings)
    if settings.keys and settings.registry and not key:
        raise ValueError("--keys: gateways prove who they are by the operator's key; name it with --operator-key-file")
    return Passes(key) if key else None


def read_calibrations(path: Path | None) -> Calibrations:
    """What was measured of instances; none where the file is not there yet.

    Raises:
        ValueError: the file cannot be read, or is none.
    """
    if path is None or not path.exists():
        return Calibrations()
    try:
        return parse_calibrations(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--calibration {path}: {getattr(error, 'strerror', None) or error}") from None


def _own_address(settings: InstanceSettings, port: int) -> str:
    """Where this process reaches itself."""
    host = split_address(settings.listen)[0]
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{near}]:{port}" if ":" in near else f"{near}:{port}"


def _grace_s(settings: InstanceSettings, stop: Stop) -> float:
    return settings.grace_s if stop.grace_s is None else stop.grace_s


def _refuse(error: Exception) -> int:
    """Told to a person on stderr, beside the log: this process cannot run as configured."""
    print(f"infermesh: {error}", file=sys.stderr)
    log.error("cannot run", error=str(error))
    return 2


async def _unless_stopped(loading: asyncio.Future[Endpoint], stop: Stop) -> bool:
    """Waits for the model; False when the process is told to stop first."""
    return await _first(loading, stop.asked)


async def _first(work: asyncio.Future[Any], event: asyncio.Event) -> bool:
    """Whether the work is done before the event comes; else it is cancelled."""
    came = asyncio.ensure_future(event.wait())
    either: set[asyncio.Future[Any]] = {work, came}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    came.cancel()
    if work.done():
        return True
    work.cancel()
    return False


async def _until_over(died: asyncio.Future[str], stop: Stop) -> int:
    asked = asyncio.ensure_future(stop.asked.wait())
    either: set[asyncio.Future[Any]] = {died, asked}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not died.done():
        return 0
    log.critical("the engine is dead; this process ends", reason=died.result())
    print(f"infermesh: the engine is dead: {died.result()}", file=sys.stderr)
    return 1


def _facts(endpoint: Endpoint, port: int) -> dict[str, object]:
    return {"id": endpoint.id, "address": endpoint.address, "port": port, "pid": endpoint.pid, "model": endpoint.model}
