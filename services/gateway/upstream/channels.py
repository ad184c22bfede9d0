"""Connections to instances: for each life one data channel, and one for Link and health, which load cannot starve."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from infermesh.transport import Trust, channel_options, open_aio_channel
from infermesh.v1 import worker_pb2_grpc
from registry.endpoint import Endpoint
from services.gateway.upstream.calls import Method

CLOSE_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """The open connections of one life. `calls` take and give raw bytes."""

    address: str
    data: grpc.aio.Channel
    control: grpc.aio.Channel
    calls: dict[Method, Any]  # unary_unary or unary_stream callables
    worker: worker_pb2_grpc.WorkerServiceAsyncStub
    health: health_pb2_grpc.HealthStub

    async def close(self) -> None:
        await asyncio.gather(self.data.close(CLOSE_GRACE_S), self.control.close())


class Channels:
    """`tls`: whom to trust; None = in the clear."""

    def __init__(self, *, wan: bool = False, tls: Trust | None = None) -> None:
        self._tls = tls
        self._options = channel_options(wan=wan)
        self._lines: dict[tuple[str, int], Line] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def open(self, endpoint: Endpoint) -> Line:
        """The line of this life; dialled anew when it moved."""
        life = (endpoint.id, endpoint.incarnation)
        line = self._lines.get(life)
        if line is not None and line.address == endpoint.address:
            return line
        if line is not None:
            self.close(*life)
        line = self._lines[life] = self._dial(endpoint.address)
        return line

    def close(self, id: str, incarnation: int) -> None:
        line = self._lines.pop((id, incarnation), None)
        if line is not None:
            task = asyncio.create_task(line.close(), name=f"close-{id}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close_all(self) -> None:
        for life in list(self._lines):
            self.close(*life)
        await asyncio.gather(*self._closing)

    def _dial(self, address: str) -> Line:
        data = open_aio_channel(address, self._options, self._tls)
        control = open_aio_channel(address, self._options, self._tls)
        calls: dict[Method, Any] = {
            method: data.unary_stream(method.path) if method.streams else data.unary_unary(method.path)
            for method in Method
        }
        worker = worker_pb2_grpc.WorkerServiceStub(control)
        return Line(address, data, control, calls, worker, health_pb2_grpc.HealthStub(control))
