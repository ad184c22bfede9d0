"""MeshService: what the gateway knows and decides, and draining an instance."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from infermesh.errors import MeshError, Reason, unsupported
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1 import mesh_pb2_grpc
from infermesh.v1.worker_pb2 import Load
from services.chassis.identity import metadata_value
from services.chassis.keys import Keys
from services.chassis.rpc import Context, stream, unary
from services.gateway.routing.decision import Record
from services.gateway.routing.facts import Facts
from services.gateway.routing.policy import may_serve
from services.gateway.upstream.calls import InstanceView
from services.gateway.upstream.directory import Directory

MESH = "infermesh.v1.MeshService"
QUIET_S = 0.1  # changes that come together are told together
KINDS = ("llm", "embedding", "rerank")


class Mesh(mesh_pb2_grpc.MeshServiceServicer):
    def __init__(self, directory: Directory, keys: Keys) -> None:
        self._directory = directory
        self._keys = keys

    @unary
    async def ListInstances(self, request: ms.ListInstancesRequest, context: Context) -> ms.ListInstancesResponse:
        models = self._models(context)
        found = self._instances(models, request.kind, request.model)
        return ms.ListInstancesResponse(instances=found, registry_stale=self._directory.stale)

    @stream
    async def WatchInstances(
        self, request: ms.WatchInstancesRequest, context: Context
    ) -> AsyncIterator[ms.WatchInstancesResponse]:
        models = self._models(context)
        while True:
            changed = asyncio.ensure_future(self._directory.changed())
            try:
                found = self._instances(models, request.kind, "")
                yield ms.WatchInstancesResponse(instances=found, registry_stale=self._directory.stale)
                await changed
            finally:
                changed.cancel()
            await asyncio.sleep(QUIET_S)

    @unary
    async def Explain(self, request: ms.ExplainRequest, context: Context) -> ms.ExplainResponse:
        models = self._models(context)
        if request.request_id:
            raise unsupported("request_id", "past requests are not kept; describe one by kind and model")
        if models and request.model not in models:
            raise MeshError(Reason.PERMISSION_DENIED, f"this API key is not for the model {request.model!r}")
        facts = Facts(
            kind=request.kind or "llm",
            model=request.model,
            prompt_tokens=request.prompt_tokens,
            counted=request.prompt_tokens > 0,
            max_tokens=request.max_tokens,
            features=frozenset(request.features),
        )
        return ms.ExplainResponse(decision_json=json.dumps(as_dict(self._directory.explain(facts))))

    @unary
    async def DrainInstance(self, request: ms.DrainInstanceRequest, context: Context) -> ms.DrainInstanceResponse:
        self._keys.operator(metadata_value(context, "authorization"))
        grace_ms = request.grace_ms if request.HasField("grace_ms") else None
        running = await self._directory.drain(request.instance_id, grace_ms, request.reason)
        return ms.DrainInstanceResponse(running=running)

    @unary
    async def Pick(self, request: ms.PickRequest, context: Context) -> ms.PickResponse:
        raise MeshError(Reason.UNIMPLEMENTED, "MeshService.Pick (direct mode) is not served by this version")

    @unary
    async def Report(self, request: ms.ReportRequest, context: Context) -> ms.ReportResponse:
        raise MeshError(Reason.UNIMPLEMENTED, "MeshService.Report (direct mode) is not served by this version")

    def _models(self, context: Context) -> frozenset[str]:
        """The models of the caller's key; empty = all."""
        key = self._keys.who(metadata_value(context, "authorization"))
        return frozenset(key.models if key is not None else ())

    def _instances(self, models: frozenset[str], kind: str, model: str) -> list[ms.Instance]:
        """Those that may serve a key for `models`; a name asked for may be a weighted alias."""
        aliases = self._directory.aliases
        return [
            instance_message(view)
            for view in self._directory.instances()
            if (not kind or view.kind == kind)
            and (not model or may_serve((model,), view.model, view.aliases, aliases))
            and may_serve(models, view.model, view.aliases, aliases)
        ]


def instance_message(view: InstanceView) -> ms.Instance:
    return ms.Instance(
        id=view.id,
        kind=view.kind,
        model=view.model,
        address=view.address,
        state=view.state,
        rejected_reason=view.rejected_reason,
        metadata=view.metadata,
        load=Load(running=view.running, waiting=view.waiting, kv_used_ratio=view.kv_used_ratio),
        weight=view.weight,
        incarnation=view.incarnation,
        in_flight=view.in_flight,
    )


def as_dict(record: Record) -> Mapping[str, Any]:
    """The decision record as it is shown."""
    shown = dataclasses.asdict(record)
    shown["candidates"] = [
        {
            "id": candidate.id,
            "cost_s": candidate.cost_s,
            "terms": dict(candidate.terms),
            "weight": candidate.weight,
            "cached_tokens": candidate.cached_tokens,
            "ready": candidate.ready,
        }
        for candidate in record.candidates
    ]
    shown["rejected"] = [{"id": id, "reason": word} for id, word in record.rejected]
    return shown
