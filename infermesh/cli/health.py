"""`infermesh health`: what container health checks run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infermesh.cli import BAD_USAGE, Failure


def command(
    address: Annotated[str, typer.Argument(metavar="[grpcs://]HOST:PORT", help="Of a gateway or an instance.")],
    ca_file: Annotated[Path | None, typer.Option(help="grpcs: the authority that vouches for it.")] = None,
    tls_name: Annotated[str, typer.Option(help="grpcs: whom its certificate is for; default: the host.")] = "",
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.", min=0.001)] = 5,
) -> None:
    """Ask one process whether it serves, by the gRPC health protocol. Exit code 0: it does; 1: it does not.

    Examples:
        infermesh health 127.0.0.1:50051
        infermesh health grpcs://10.0.0.5:50050 --ca-file mesh-ca.pem
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from infermesh.client.addresses import split
    from infermesh.transport import open_channel, trust

    try:
        (target, *_), secure = split(address)
        tls = trust(ca_file or "", tls_name) if secure else None
    except (ValueError, OSError) as error:
        raise Failure(str(error), BAD_USAGE) from None
    with open_channel(target, [("grpc.enable_http_proxy", 0)], tls) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise Failure(f"{address}: {error.code().name.lower()}: {error.details()}") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise Failure(f"{address}: {status.lower()}")
    print(status.lower())
