"""The gateway's composition root: one event loop, two doors, one forwarder."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import random
import secrets
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

import infermesh
from infermesh.transport import Trust, trust
from infermesh.v1 import mesh_pb2_grpc
from registry.advertise import advertised
from registry.endpoint import Endpoint
from registry.port import Registry, RegistryError
from services.chassis.certificates import Certificate
from services.chassis.keys import Keys, load_keys
from services.chassis.logs import configure_logs
from services.chassis.passes import Passes
from services.chassis.ready import tell_ready
from services.chassis.registering import connect_registry, operator_key
from services.chassis.server import Phase, Server
from services.chassis.settings import split_address
from services.chassis.signals import Stop
from services.gateway.config import DEFAULT_BANS, DEFAULT_PAST, GatewaySettings
from services.gateway.front import rpc
from services.gateway.front.answer import Answer
from services.gateway.front.console.live import Live
from services.gateway.front.direct import DirectDoor
from services.gateway.front.embed_stream import EmbedStream
from services.gateway.front.http_server import HttpServer, build_http_server
from services.gateway.front.mesh import Mesh
from services.gateway.front.rest import build_app
from services.gateway.loop import HoldMeter, run_metered
from services.gateway.observe import Observe
from services.gateway.past.decisions import Decisions
from services.gateway.past.ring import Ring
from services.gateway.past.traffic import Traffic
from services.gateway.routing.admission import Bounds
from services.gateway.routing.router import Router
from services.gateway.tracing import Tracing
from services.gateway.upstream.bans import BanBoard
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.channels import Channels
from services.gateway.upstream.direct import Direct
from services.gateway.upstream.directory import Directory
from services.gateway.upstream.forward import Forwarder
from services.gateway.upstream.shown import Showing, Shown

SERVICES = (rpc.LANGUAGE_MODEL, rpc.EMBEDDING, rpc.RERANK, rpc.RETRIEVE)
GUARDED = (f"{rpc.MESH}/Pick",)  # beside them, while the gateway starts or drains
SETTLE_S = 0.5  # between NOT_SERVING and the end of the listeners: balancers and clients need a moment to hear
STOP_S = 0.5
REST_STOP_S = 1.0  # uvicorn counts whole seconds
log = structlog.get_logger("gateway")


@dataclass(slots=True)
class Gateway:
    """The parts of a running gateway."""

    settings: GatewaySettings
    server: Server
    forwarder: Forwarder
    directory: Directory
    carrier: Carrier
    observe: Observe
    keys: Keys
    live: Live
    decisions: Decisions | None = None
    registry: Registry | None = None
    rest: HttpServer | None = None
    certificate: Certificate | None = None


def main(settings: GatewaySettings) -> int:
    """A gateway as the whole of a process; see `run`."""
    return run_metered(lambda meter: run(settings, meter=meter))


async def run(settings: GatewaySettings, stop: Stop | None = None, meter: HoldMeter | None = None) -> int:
    """Runs one gateway to its end. Returns the exit code: 0 drained, 1 failed, 2 cannot run as configured.

    `stop` is for those who run it in a process of their own making; by default signals ask.
    """
    _, port = split_address(settings.grpc)
    gateway_id = settings.id or f"gateway-{socket.gethostname()}-{port or os.getpid()}"
    configure_logs(settings.log_level, gateway=gateway_id)
    own_signals = stop is None
    stop = stop or Stop()
    try:
        gateway = _compose(settings, gateway_id)
        bound, host, advertised_port = await _listen(gateway)
    except (ValueError, OSError, RegistryError) as error:
        print(f"infermesh: {error}", file=sys.stderr)
        log.error("cannot run", error=str(error))
        return 2
    if own_signals:
        stop.listen()
    tasks = _background(gateway)
    endpoint = Endpoint(
        id=gateway_id,
        kind="gateway",
        host=host,
        port=advertised_port or bound,
        model="",
        incarnation=secrets.randbits(64),
        pid=os.getpid(),
        version=infermesh.__version__,
        extra={"http": _http_address(gateway)} if gateway.rest else {},
    )
    bans, own = gateway.directory.bans, endpoint.extra
    banned = bans.metadata
    endpoint = replace(endpoint, extra={**own, **banned})
    code = 1
    try:
        await _rest_started(gateway, tasks)
        await gateway.server.enter(Phase.SERVING)
        if gateway.registry is not None:
            await gateway.registry.register(endpoint)
            registry = gateway.registry

            async def publish(metadata: dict[str, str]) -> None:
                await registry.renew(replace(endpoint, extra={**own, **metadata}))

            await bans.tell(publish, banned)
        _ready(gateway, endpoint, bound)
        log.info("serving", grpc=f"{host}:{bound}", http=_http_address(gateway))
        # What is loaded by now stays: a full collection would walk it again and again (tens of ms on the loop).
        gc.collect()
        gc.freeze()
        if meter is not None:
            meter.reset()  # what loading libraries held was no request's delay
            gateway.observe.metrics.watch_loop(meter)
        code = await _until_over(stop, tasks)
    except RegistryError as error:
        print(f"infermesh: {error}", file=sys.stderr)
        log.error("cannot register", error=str(error))
        code = 2
    finally:
        await _leave(gateway, gateway_id, tasks, hurry=code != 0)
    log.info("stopped", exit_code=code, loop_hold_max_ms=round(meter.longest * 1000, 1) if meter else None)
    return code


def _compose(settings: GatewaySettings, gateway_id: str) -> Gateway:
    keys = load_keys(settings.keys)
    key = operator_key(settings)
    certificate = settings.certificate()
    salt = _secret(settings.salt_file, "salt_file") or key or "infermesh"
    registry = connect_registry(settings, over_tls=certificate is not None)
    routing = settings.routing
    tracing = Tracing(settings.otlp, gateway_id, settings.otlp_ratio) if settings.otlp else None
    observe = Observe(tracing, ttft_s=routing.ttft_s, tpot_ms=routing.tpot_ms)
    clock = asyncio.get_running_loop().time
    queue = settings.queue
    bounds = Bounds(queue.max_requests, queue.max_tokens, queue.max_wait_s)
    policy = routing.policy(settings.weights)
    router = Router(clock(), bounds, policy=policy, salt=gateway_id)
    tls = _trusted(settings)
    carrier = Carrier(router, Channels(tls=tls), observe, clock, Passes(key) if key else None)
    # Instances count what a gateway sent by (id, seq); a restarted gateway begins at 1 again, under another name.
    life = f"{gateway_id}-{secrets.token_hex(4)}"
    port = split_address(settings.grpc)[1]
    name = settings.id or (f"gateway-{port}" if port else "")  # by which its file is found again
    bans = BanBoard(carrier, settings.bans_file or (DEFAULT_BANS / f"{name}.json" if name else None))
    directory = Directory(carrier, life, settings.weights, policy.aliases, bans)
    forwarder = Forwarder(
        carrier,
        observe,
        life,
        limits=settings.limits,
        secret=hashlib.sha256(salt.encode()).digest(),
        time_granularity_s=settings.time_granularity_s,
        showing=Showing({id: Shown(**rule.model_dump()) for id, rule in settings.telemetry.items()}),
        draw=random.Random(secrets.randbits(64)),
    )
    server = Server(SERVICES, methods=GUARDED, max_streams=settings.limits.max_streams, debug=settings.channelz)
    door = rpc.Door(forwarder, keys, observe)
    server.gate.on_refusal = door.turned_away
    server.grpc.add_generic_rpc_handlers(rpc.handlers(door, EmbedStream(door), Answer(door, directory)))
    about = {"id": gateway_id, "version": infermesh.__version__, "ttft_s": routing.ttft_s, "tpot_ms": routing.tpot_ms}

    def numbers() -> dict[str, int]:
        return {"in_flight": forwarder.budget.live, "waiting": router.waiting}

    traffic, decisions = Traffic(), _decisions(settings)
    live = Live(directory, about | {"since": time.time()}, policy.fallbacks, time.time, numbers, decisions)
    observe.metrics.watch_groups(router.groups)
    observe.listeners += [live.finished, traffic.keep, *([decisions.keep] if decisions else [])]
    direct = DirectDoor(door, Direct(forwarder, tls))
    mesh_pb2_grpc.add_MeshServiceServicer_to_server(Mesh(directory, keys, traffic, direct, decisions), server.grpc)
    return Gateway(
        settings,
        server,
        forwarder,
        directory,
        carrier,
        observe,
        keys,
        live,
        decisions,
        registry,
        certificate=certificate,
    )


def _trusted(settings: GatewaySettings) -> Trust | None:
    """Whom instances have to be vouched for by; None: they are spoken to in the clear. Raises ValueError."""
    file = settings.instances_ca_file
    if file is None:
        if settings.instances_tls_name:
            raise ValueError("--instances-tls-name: is for TLS, which --instances-ca-file turns on")
        return None
    try:
        return trust(file, settings.instances_tls_name)
    except OSError as error:
        raise ValueError(f"--instances-ca-file {file}: {error.strerror}") from None


def _decisions(settings: GatewaySettings) -> Decisions | None:
    """Those of past requests. Only a folder that was asked for has to be there.

    Raises:
        ValueError: it cannot be used.
    """
    if not settings.explain_mib:
        return None
    # By the port where there is no id: the same gateway finds its own again, and others of this folder have theirs.
    name = settings.id or f"gateway-{split_address(settings.grpc)[1]}"
    folder = (settings.explain_dir or DEFAULT_PAST) / name
    try:
        return Decisions(Ring(folder, settings.explain_mib << 20))
    except OSError as error:
        why = "another gateway writes there" if isinstance(error, BlockingIOError) else error.strerror
        if settings.explain_dir is not None:
            raise ValueError(f"explain_dir: {folder}: {why}") from None
        log.warning("past decisions are not kept; --explain-dir names a folder for them", folder=str(folder), why=why)
        return None


def _rest(gateway: Gateway, keys: Keys) -> HttpServer:
    """Binds the REST door. Raises OSError."""

    def draining() -> bool:
        return gateway.server.gate.phase is not Phase.SERVING

    settings = gateway.settings
    live = gateway.live
    app = build_app(gateway.forwarder, gateway.directory, keys, settings.limits, gateway.observe, draining, live)
    host, port = split_address(settings.http)
    tls = gateway.certificate.context if gateway.certificate is not None else None
    return build_http_server(app, host, port, settings.limits, tls=tls)


async def _listen(gateway: Gateway) -> tuple[int, str, int]:
    """Binds both doors. Returns the gRPC port, and the (host, port) to register."""
    settings = gateway.settings
    host, _ = split_address(settings.grpc)
    shown, port = advertised(settings.advertise or None, host, settings.registry or None)
    if settings.http:
        gateway.rest = _rest(gateway, gateway.keys)
    try:
        return await gateway.server.start(settings.grpc, [rpc.MESH], gateway.certificate), shown, port
    except OSError:
        if gateway.rest is not None:
            gateway.rest.close()
        raise


def _background(gateway: Gateway) -> list[asyncio.Task[None]]:
    """What runs beside requests. None of it ends while the gateway lives."""
    bans = gateway.directory.bans
    jobs = {"tick": gateway.carrier.run(), "links": gateway.directory.run(), "bans": bans.run()}
    if gateway.registry is not None:
        jobs["gateways"] = bans.watch(gateway.registry)
        jobs["registry"] = gateway.directory.watch(gateway.registry)
    if gateway.certificate is not None:
        jobs["certificate"] = gateway.certificate.watch()
    if gateway.decisions is not None:
        jobs["decisions"] = gateway.decisions.run()
    if gateway.rest is not None:
        jobs |= {"rest": gateway.rest.serve(), "console": gateway.live.run()}
    return [asyncio.create_task(job, name=name) for name, job in jobs.items()]


async def _rest_started(gateway: Gateway, tasks: list[asyncio.Task[None]]) -> None:
    if gateway.rest is not None:
        ready = asyncio.create_task(gateway.rest.ready())
        await asyncio.wait({ready, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()


async def _until_over(stop: Stop, tasks: list[asyncio.Task[None]]) -> int:
    asked = asyncio.create_task(stop.asked.wait())
    done, _ = await asyncio.wait({asked, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    if asked in done:
        return 0
    asked.cancel()
    for task in done:
        error = None if task.cancelled() else task.exception()
        log.critical("a part of the gateway ended; so does the process", part=task.get_name(), exc_info=error)
    return 1


async def _leave(gateway: Gateway, gateway_id: str, tasks: list[asyncio.Task[None]], *, hurry: bool) -> None:
    """NOT_SERVING, readyz 503 -> out of the registry -> what runs finishes within the grace -> the listeners close."""
    grace_s = 0.0 if hurry else gateway.settings.grace_s
    await gateway.server.enter(Phase.DRAINING)
    if gateway.registry is not None:
        await gateway.registry.deregister(gateway_id)
    if not hurry and (gateway.registry is not None or not gateway.forwarder.idle.is_set()):
        await asyncio.sleep(SETTLE_S)
    try:
        async with asyncio.timeout(grace_s):
            await gateway.forwarder.idle.wait()
    except TimeoutError:
        log.warning("grace period over", still_running=gateway.forwarder.budget.live)
    if gateway.rest is not None:
        gateway.rest.stop(REST_STOP_S)
    await gateway.server.stop(STOP_S)
    rest = [task for task in tasks if task.get_name() == "rest"]
    if rest:
        await asyncio.wait(rest, timeout=2.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await gateway.directory.close()
    await gateway.carrier.channels.close_all()
    if gateway.registry is not None:
        await gateway.registry.close()
    if gateway.decisions is not None:
        await gateway.decisions.close()
    await gateway.observe.close()


def _secret(path: Path | None, key: str) -> str:
    if path is None:
        return ""
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ValueError(f"{key}: {path}: {error.strerror}") from None


def _http_address(gateway: Gateway) -> str:
    if gateway.rest is None:
        return ""
    host, _ = split_address(gateway.settings.http)
    return f"[{host}]:{gateway.rest.port}" if ":" in host else f"{host}:{gateway.rest.port}"


def _ready(gateway: Gateway, endpoint: Endpoint, port: int) -> None:
    """Tells a supervisor, in one atomic step, that this gateway serves."""
    host, _ = split_address(gateway.settings.grpc)
    bound = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    facts = {"id": endpoint.id, "address": endpoint.address, "port": port, "pid": os.getpid()}
    tell_ready(gateway.settings.ready_file, facts | {"grpc": bound, "http": _http_address(gateway)})
