"""`infermesh health`: what container health checks run."""

from __future__ import annotations

from typing import Annotated

import typer

from infermesh.cli import Failure


def command(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of a gateway or an instance.")],
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.", min=0.001)] = 5,
) -> None:
    """Ask one process whether it serves, by the gRPC health protocol. Exit code 0: it does; 1: it does not.

    Examples:
        infermesh health 127.0.0.1:50051
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise Failure(f"{address}: {error.code().name.lower()}: {error.details()}") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise Failure(f"{address}: {status.lower()}")
    print(status.lower())
