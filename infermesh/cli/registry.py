"""`infermesh registry`, and the embedded registry as `up` hosts it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infermesh.cli import BAD_USAGE, Failure

if TYPE_CHECKING:
    from services.chassis.certificates import Certificate
    from services.chassis.keys import Keys

REGISTRY_SERVICE = "infermesh.v1.RegistryService"


def command(
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:50049",
    keys: Annotated[Path | None, typer.Option(help="keys.yaml; then Register needs the operator's key.")] = None,
    tls_cert_file: Annotated[Path | None, typer.Option(help="It serves over TLS: its certificate, PEM.")] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without keys.")] = False,
    ready_file: Annotated[Path | None, typer.Option(help="Written, as JSON, once it serves.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the embedded registry, for a small mesh without Consul. One process a mesh hosts it; `up` does so itself.

    Examples:
        infermesh registry
        infermesh registry --listen 10.0.0.5:50049 --keys keys.yaml
    """
    import asyncio

    from services.chassis.certificates import TlsSettings
    from services.chassis.keys import load_keys
    from services.chassis.logs import configure_logs

    if log_level not in (levels := ("debug", "info", "warning", "error")):
        raise Failure(f"--log-level: {log_level!r} is none of {', '.join(levels)}", BAD_USAGE)
    configure_logs(log_level, kind="registry")
    try:
        certificate = TlsSettings(tls_cert_file=tls_cert_file, tls_key_file=tls_key_file).certificate()
    except ValueError as error:
        raise Failure(str(error), BAD_USAGE) from None
    asyncio.run(_serve(listen, load_keys(keys), insecure, ready_file, certificate))


async def _serve(
    listen: str, keys: Keys, insecure: bool, ready_file: Path | None, certificate: Certificate | None
) -> None:
    import os

    import structlog

    from services.chassis.ready import tell_ready
    from services.chassis.signals import Stop

    stop = Stop()
    stop.listen()
    async with hosted_registry(listen, keys, insecure=insecure, certificate=certificate) as address:
        structlog.get_logger("registry").info("serving", address=f"mesh://{address}")
        tell_ready(ready_file, {"address": address, "pid": os.getpid()})
        await stop.asked.wait()


@asynccontextmanager
async def hosted_registry(
    listen: str, keys: Keys, *, insecure: bool = False, certificate: Certificate | None = None
) -> AsyncIterator[str]:
    """The embedded registry on a port of its own, in this process's loop. Gives its HOST:PORT.

    Raises:
        Failure: the address cannot be listened on.
    """
    import asyncio

    from infermesh.v1 import registry_pb2_grpc
    from registry.host import EmbeddedRegistry
    from services.chassis.server import Phase, Server
    from services.chassis.settings import bind_fault, split_address

    host, _ = split_address(listen)
    if fault := bind_fault(host, keys=bool(keys), insecure=insecure):
        raise Failure(f"--listen: {fault}", BAD_USAGE)
    server = Server(())
    try:
        async with EmbeddedRegistry(authorize=keys.operator if keys else None) as registry:
            registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server.grpc)
            try:
                port = await server.start(listen, [REGISTRY_SERVICE], certificate)
            except OSError as error:
                raise Failure(f"the registry: {error}", BAD_USAGE) from None
            await server.enter(Phase.SERVING)
            watching = asyncio.create_task(certificate.watch()) if certificate is not None else None
            try:
                yield f"{host}:{port}"
            finally:
                if watching is not None:
                    watching.cancel()
    finally:
        await server.stop(0.5)  # after the registry has ended its streams: nothing is left to wait for
