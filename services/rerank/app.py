"""The rerank instance's composition root: settings -> engine and scorer -> servicer -> chassis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import grpc.aio
import structlog

from infermesh.v1 import rerank_pb2_grpc
from registry.endpoint import Endpoint
from services.chassis.encoding.engine import EncodingEngine
from services.chassis.encoding.settings import find_source
from services.chassis.instance import InstanceContext, Program, run_instance
from services.rerank.scorer import BiScorer, CrossScorer
from services.rerank.service import SERVICE, RerankService
from services.rerank.settings import RerankSettings, choose_scorer

FEATURES = ("max_tokens_per_document", "raw_scores", "return_documents", "top_n", "truncation")


async def serve(settings: RerankSettings) -> int:
    """Runs the instance to its end and returns the process's exit code."""
    source = find_source(settings.source)

    def build(context: InstanceContext) -> Program:
        return program(settings, source, context)

    return await run_instance(settings, build)


def program(settings: RerankSettings, source: str, context: InstanceContext) -> Program:
    name, reason = choose_scorer(settings.scorer, source)
    structlog.get_logger("rerank").info("scorer chosen", scorer=name, why=reason)
    cross = name == "cross-encoder"
    engine = EncodingEngine(settings, "cross-encoder" if cross else "embedding", source)
    scorer = CrossScorer(engine) if cross else BiScorer(engine)
    service = RerankService(engine, scorer, context.identity, context.arrivals, context.keys)

    def add_services(server: grpc.aio.Server) -> None:
        rerank_pb2_grpc.add_RerankServiceServicer_to_server(service, server)

    async def start(draft: Endpoint, progress: Callable[[str], None]) -> Endpoint:
        endpoint = await engine.start(draft, progress)
        endpoint = dataclasses.replace(endpoint, features=frozenset(FEATURES), extra={**endpoint.extra, "scorer": name})
        service.serve(endpoint)
        return endpoint

    return Program((SERVICE,), add_services, start, engine.load, engine.died, engine.close)
