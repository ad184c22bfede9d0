"""An embedding instance that answers at once with 2,048 × 1,024 floats: what a bench of the gateway's loop needs."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import numpy as np

from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import embedding_pb2_grpc
from infermesh.v1.inference_pb2 import Usage, Vector
from infermesh.v1.worker_pb2 import Load
from registry.endpoint import Endpoint
from services.chassis.identity import announce
from services.chassis.instance import InstanceContext, Program, run_instance
from services.chassis.rpc import Context, unary
from services.chassis.settings import InstanceSettings

DIMENSIONS = 1024


class Wide(embedding_pb2_grpc.EmbeddingServiceServicer):
    def __init__(self, context: InstanceContext) -> None:
        self._context = context
        row = np.random.default_rng(1).standard_normal(DIMENSIONS).astype("<f4")
        self._vector = Vector(packed=row.tobytes())

    @unary
    async def Embed(self, request: em.EmbedRequest, context: Context) -> em.EmbedResponse:
        with self._context.arrivals.enter(request.relay):
            await announce(context, self._context.identity)
            count = len(request.texts)
            return em.EmbedResponse(
                vectors=[self._vector] * count,
                usage=Usage(prompt_tokens=count),
                model=self._context.settings.model,
                dimensions=DIMENSIONS,
            )


def build(context: InstanceContext) -> Program:
    async def start(draft: Endpoint, progress: Callable[[str], None]) -> Endpoint:
        return dataclasses.replace(draft, engine="bench")

    async def died() -> str:
        await asyncio.Event().wait()
        return ""

    async def close() -> None: ...

    def add(server: grpc.aio.Server) -> None:
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(Wide(context), server)

    return Program(("infermesh.v1.EmbeddingService",), add, start, lambda: Load(running=0), died, close)


if __name__ == "__main__":
    registry, ready_file = sys.argv[1:]
    settings = InstanceSettings(kind="embedding", model="wide", registry=registry, ready_file=Path(ready_file))
    sys.exit(asyncio.run(run_instance(settings, build)))
