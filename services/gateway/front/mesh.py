"""MeshService: what the gateway knows and decides, and draining an instance."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1 import mesh_pb2_grpc
from infermesh.v1.worker_pb2 import Load
from services.chassis.identity import metadata_value
from services.chassis.keys import Keys
from services.chassis.rpc import Context, stream, unary
from services.gateway.front.direct import DirectDoor
from services.gateway.past.decisions import Decisions, shown
from services.gateway.past.traffic import Finished, Traffic, traced
from services.gateway.routing.facts import Facts
from services.gateway.routing.groups import GroupView
from services.gateway.routing.policy import may_serve
from services.gateway.upstream.calls import InstanceView
from services.gateway.upstream.directory import KINDS, Directory

QUIET_S = 0.1  # changes that come together are told together
HEARTBEAT_S = 1.0  # a recording hears so often that nothing came
SALT_BYTES = 32


class Mesh(mesh_pb2_grpc.MeshServiceServicer):
    """`decisions`: of past requests, None where none are kept."""

    def __init__(
        self, directory: Directory, keys: Keys, traffic: Traffic, direct: DirectDoor, decisions: Decisions | None = None
    ) -> None:
        self._directory = directory
        self._direct = direct
        self._keys = keys
        self._traffic = traffic
        self._decisions = decisions

    @unary
    async def ListInstances(self, request: ms.ListInstancesRequest, context: Context) -> ms.ListInstancesResponse:
        models = self._models(context)
        _check_kind(request.kind)
        return ms.ListInstancesResponse(
            instances=self._instances(models, request.kind, request.model),
            registry_stale=self._directory.stale,
            groups=self._groups(models, request.kind, request.model),
        )

    @stream
    async def WatchInstances(
        self, request: ms.WatchInstancesRequest, context: Context
    ) -> AsyncIterator[ms.WatchInstancesResponse]:
        models = self._models(context)
        _check_kind(request.kind)
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
        if request.request_id:
            return await self._past(request.request_id, context)
        models = self._models(context)
        _check_kind(request.kind)
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
        return ms.ExplainResponse(decision_json=json.dumps(shown(self._directory.explain(facts))))

    async def _past(self, request_id: str, context: Context) -> ms.ExplainResponse:
        """Of a caller's own tenant; an operator sees all."""
        key = self._keys.who(metadata_value(context, "authorization"))
        if self._decisions is None:
            why = "this gateway keeps no past decisions: give it a folder it may write with --explain-dir"
            raise MeshError(Reason.FAILED_PRECONDITION, why)
        mine = None if key is None or key.role == "operator" else key.tenant
        found = await self._decisions.find(request_id, lambda tenant: mine is None or tenant == mine)
        if found is not None:
            return ms.ExplainResponse(decision_json=json.dumps(found))
        since = await self._decisions.since()
        back = f"since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M:%S} UTC" if since else "nothing yet"
        raise MeshError(
            Reason.NOT_FOUND,
            f"this gateway knows of no request {request_id[:128]!r} (it remembers {back}); each gateway knows its own: "
            "ask the one that served it with --gateway",
        )

    @stream
    async def RecordTraffic(
        self, request: ms.RecordTrafficRequest, context: Context
    ) -> AsyncIterator[ms.RecordTrafficResponse]:
        self._keys.operator(metadata_value(context, "authorization"))
        salt = secrets.token_bytes(SALT_BYTES)
        with self._traffic.tap() as tap:
            yield ms.RecordTrafficResponse()  # it has begun
            while True:
                batch = await tap.take(HEARTBEAT_S)
                requests = await asyncio.to_thread(_traced, batch, salt) if batch else []
                yield ms.RecordTrafficResponse(requests=requests, dropped=tap.dropped)

    @unary
    async def DrainInstance(self, request: ms.DrainInstanceRequest, context: Context) -> ms.DrainInstanceResponse:
        self._keys.operator(metadata_value(context, "authorization"))
        grace_ms = request.grace_ms if request.HasField("grace_ms") else None
        running = await self._directory.drain(request.instance_id, grace_ms, request.reason, undo=request.undo)
        return ms.DrainInstanceResponse(running=running)

    @unary
    async def BanInstance(self, request: ms.BanInstanceRequest, context: Context) -> ms.BanInstanceResponse:
        self._keys.operator(metadata_value(context, "authorization"))
        if not request.instance_id:
            raise invalid("instance_id", "whom?")
        if request.HasField("for_ms") and not request.for_ms:
            raise invalid("for_ms", "at least 1; leave it unset for a ban that holds until it is lifted")
        for_s = request.for_ms / 1000 if request.HasField("for_ms") else None
        await self._directory.ban(request.instance_id, request.by, request.why, for_s, lifted=request.lift)
        return ms.BanInstanceResponse()

    @unary
    async def Pick(self, request: ms.PickRequest, context: Context) -> ms.PickResponse:
        return await self._direct.pick(request, context)

    @unary
    async def Report(self, request: ms.ReportRequest, context: Context) -> ms.ReportResponse:
        return await self._direct.report(request, context)

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

    def _groups(self, models: frozenset[str], kind: str, model: str) -> list[ms.Group]:
        return [
            group_message(view)
            for view in self._directory.groups()
            if (not kind or view.kind == kind)
            and (not model or view.model == model)
            and (not models or may_serve(models, view.model, (), self._directory.aliases))
        ]


def _check_kind(kind: str) -> None:
    if kind and kind not in KINDS:
        raise invalid("kind", f"{kind[:64]!r} is none of {', '.join(KINDS)}")


def group_message(view: GroupView) -> ms.Group:
    return ms.Group(
        name=view.name,
        kind=view.kind,
        model=view.model,
        least=view.least,
        most=view.most,
        desired=view.desired,
        replicas=view.replicas,
        use=view.use,
        short=view.short,
        backlog_s=view.backlog_s,
        why=view.why,
    )


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
        why=view.why,
        since_s=view.since_s,
    )


def _traced(batch: list[Finished], salt: bytes) -> list[ms.TracedRequest]:
    return [traced(ended, report, salt) for ended, report in batch]
