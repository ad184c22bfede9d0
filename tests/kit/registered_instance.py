"""A process that serves grpc.health and is registered, for tests that kill it: `python -m tests.kit.registered_instance
REGISTRY-URL ID`. Prints `ready PORT` once it is registered."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from infermesh.transport import server_options
from registry.address import open_registry
from registry.endpoint import Endpoint
from registry.presence import Departure, present


def health_server() -> tuple[grpc.aio.Server, int]:
    """A server, not started, on a free port, that says SERVING."""
    from grpc_health.v1._async import HealthServicer

    server = grpc.aio.server(options=server_options())
    servicer = HealthServicer()
    asyncio.get_running_loop().create_task(servicer.set("", health_pb2.HealthCheckResponse.SERVING))
    add_HealthServicer_to_server(servicer, server)
    return server, server.add_insecure_port("127.0.0.1:0")


async def run(url: str, id: str) -> None:
    server, port = health_server()
    await server.start()
    registry = open_registry(url)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)

    async def nothing(_: object) -> None:
        pass

    endpoint = Endpoint(
        id, "llm", "127.0.0.1", port, "m", incarnation=secrets.randbits(64), engine="scripted", pid=os.getpid()
    )
    leave = Departure(settle_s=0.1, grace_s=0)
    async with present([registry], endpoint, serving=nothing, drain=nothing, departure=leave):
        print(f"ready {port}", flush=True)
        await stopped.wait()
    await registry.close()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2]))
