"""Pick and Report: direct mode as callers see it."""

from __future__ import annotations

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1.inference_pb2 import DEGRADE_ALLOW, DEGRADE_NEVER, DEGRADE_UNSPECIFIED
from services.chassis.checks import MAX_N, MAX_TOKENS, check_hints
from services.chassis.rpc import Context
from services.gateway.entrance import Entrance
from services.gateway.front.rpc import MESH, Door
from services.gateway.report import OK
from services.gateway.routing.facts import Facts
from services.gateway.upstream.calls import Caller
from services.gateway.upstream.direct import Direct
from services.gateway.upstream.directory import KINDS

PICK = Entrance(f"{MESH}/Pick")
REPORT = Entrance(f"{MESH}/Report")
MAX_NAMES = 16  # of features, and of instances to avoid
_DEGRADE = {DEGRADE_UNSPECIFIED: None, DEGRADE_NEVER: False, DEGRADE_ALLOW: True}
_OUTCOMES = frozenset({OK, *(reason.value for reason in Reason)})


class DirectDoor:
    def __init__(self, door: Door, direct: Direct) -> None:
        self._door = door
        self._direct = direct

    async def pick(self, request: ms.PickRequest, context: Context) -> ms.PickResponse:
        call = self._door.call("direct", PICK, context)
        try:
            facts = wanted(request, call.caller)
        except MeshError as error:
            self._door.watcher.refused("direct", error, call)
            raise
        picked = await self._direct.pick(facts, call)
        instance_id, model = picked.ids
        return ms.PickResponse(
            lease_id=picked.id,
            instance_id=instance_id,
            address=picked.address,
            model=model,
            degraded_from=picked.degraded_from,
            relay=picked.relay,
            metadata=picked.metadata,
            expires_ms=round(picked.expires_s * 1000),
            tls=picked.tls is not None,
            tls_name=picked.tls.name if picked.tls is not None else "",
        )

    async def report(self, request: ms.ReportRequest, context: Context) -> ms.ReportResponse:
        call = self._door.call("report", REPORT, context)
        try:
            if request.outcome not in _OUTCOMES:
                raise invalid("outcome", "must be `ok` or the word of a reason: the `reason` of the error that came")
            tokens = (min(request.prompt_tokens, MAX_TOKENS), min(request.completion_tokens, MAX_TOKENS))
            self._direct.report(request.lease_id, call.caller.tenant, request.outcome, tokens)
        except MeshError as error:
            self._door.watcher.refused("report", error, call)
            raise
        return ms.ReportResponse()


def wanted(request: ms.PickRequest, caller: Caller) -> Facts:
    """What routing needs to know of a request that goes elsewhere.

    Raises:
        MeshError: INVALID_ARGUMENT, PERMISSION_DENIED.
    """
    kind = request.kind or "llm"
    if kind not in KINDS:
        raise invalid("kind", f"{kind[:64]!r} is none of {', '.join(KINDS)}")
    if not 1 <= len(request.model) <= 256:
        raise invalid("model", "must name a model, in at most 256 characters")
    for name, most in (("prompt_tokens", MAX_TOKENS), ("max_tokens", MAX_TOKENS), ("prompt_bytes", 1 << 30)):
        if getattr(request, name) > most:
            raise invalid(name, f"at most {most}")
    if request.choices > MAX_N:
        raise invalid("choices", f"at most {MAX_N}")
    for name in ("features", "excluded"):
        names = getattr(request, name)
        if len(names) > MAX_NAMES or any(len(one) > 256 for one in names):
            raise invalid(name, f"at most {MAX_NAMES}, of at most 256 characters")
    check_hints(request.hints)
    if caller.models and request.model not in caller.models:
        raise MeshError(Reason.PERMISSION_DENIED, f"this API key is not for the model {request.model!r}", param="model")
    hints = request.hints
    return Facts(
        kind=kind,
        model=request.model,
        prompt_bytes=request.prompt_bytes,
        prompt_tokens=request.prompt_tokens,
        counted=request.prompt_tokens > 0,
        max_tokens=request.max_tokens,
        choices=request.choices or 1,
        priority=hints.priority,
        features=frozenset(request.features),
        excluded=frozenset(request.excluded),
        document_id=hints.document_id,
        session_id=hints.session_id,
        degrade=_DEGRADE.get(hints.degrade),
        ttft_target_s=hints.ttft_target_ms / 1000,
    )
