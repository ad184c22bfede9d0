"""The embedding instance's composition root: settings -> engine -> servicer -> chassis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import grpc.aio

from infermesh.v1 import embedding_pb2_grpc
from registry.endpoint import Endpoint
from services.chassis.encoding.engine import EncodingEngine
from services.chassis.encoding.settings import find_source
from services.chassis.instance import InstanceContext, Program, run_instance
from services.embedding.service import SERVICE, EmbeddingService
from services.embedding.settings import EmbeddingSettings

FEATURES = ("dimensions", "normalize", "prefix", "stream", "task", "token_ids", "truncation")


async def run(settings: EmbeddingSettings) -> int:
    """Runs the instance to its end and returns the process's exit code."""
    source = find_source(settings.source)

    def build(context: InstanceContext) -> Program:
        return program(settings, source, context)

    return await run_instance(settings, build)


def program(settings: EmbeddingSettings, source: str, context: InstanceContext) -> Program:
    engine = EncodingEngine(settings, "embedding", source)
    service = EmbeddingService(engine, context.identity, context.arrivals, context.keys)

    def add_services(server: grpc.aio.Server) -> None:
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(service, server)

    async def start(draft: Endpoint, progress: Callable[[str], None]) -> Endpoint:
        endpoint = await engine.start(draft, progress)
        endpoint = dataclasses.replace(
            endpoint,
            features=frozenset(FEATURES),
            extra={**endpoint.extra, "dims": str(engine.facts.columns)},
        )
        service.serve(endpoint)
        return endpoint

    return Program((SERVICE,), add_services, start, engine.load, engine.died, engine.close)
