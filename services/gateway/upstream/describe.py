"""From a request message to what routing needs of it, and the checks that come first. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import DEGRADE_ALLOW, DEGRADE_NEVER, DEGRADE_UNSPECIFIED
from services.chassis import checks
from services.chassis.prefix import Prefix, prefix
from services.gateway.routing.facts import Facts
from services.gateway.upstream.calls import Caller, Method

_GENERATES = (Method.CHAT, Method.COMPLETE)
_DEGRADE = {DEGRADE_UNSPECIFIED: None, DEGRADE_NEVER: False, DEGRADE_ALLOW: True}
MAX_DETOKENIZE_IDS = 1 << 20


def check(method: Method, request: Any, caller: Caller) -> None:
    """Range checks, and the caller's right to the model.

    Raises:
        MeshError: INVALID_ARGUMENT, UNSUPPORTED or PERMISSION_DENIED.
    """
    if request.HasField("relay"):
        raise invalid("relay", "is set by gateways only")
    if not request.model:
        raise invalid("model", "must name a model")
    if len(request.model) > 256:
        raise invalid("model", "at most 256 characters")
    _CHECKS[method](request)
    if caller.models and request.model not in caller.models:
        raise MeshError(Reason.PERMISSION_DENIED, f"this API key is not for the model {request.model!r}", param="model")


def describe(
    method: Method, request: Any, caller: Caller, deadline: float, now: float, salt: bytes = b"", rendered_at: int = 0
) -> Facts:
    """`salt` and `rendered_at` (unix seconds): what the request's relay will say, since both are part of its prefix."""
    size, counted = _prompt(method, request)
    begins = prefix(request, salt, rendered_at) if method in _GENERATES else Prefix()
    max_tokens, choices = 0, 1
    features: frozenset[str] = frozenset()
    document_id = session_id = ""
    priority, target_ms = 0, 0
    degrade: bool | None = None
    if method in _GENERATES:
        sampling = request.sampling
        max_tokens, choices = sampling.max_tokens, sampling.n or 1
        features = _features(method, request)
    if method is not Method.TOKENIZE and method is not Method.DETOKENIZE and request.HasField("hints"):
        hints = request.hints
        document_id, session_id, priority = hints.document_id, hints.session_id, hints.priority
        degrade, target_ms = _DEGRADE.get(hints.degrade), hints.ttft_target_ms
    return Facts(
        kind=method.kind,
        model=request.model,
        prompt_bytes=size,
        prompt_tokens=counted,
        counted=counted > 0,
        max_tokens=max_tokens,
        choices=choices,
        slots=0 if method is Method.TOKENIZE or method is Method.DETOKENIZE else 1,
        tenant=caller.tenant,
        klass=caller.klass,
        priority=priority,
        features=features,
        document_id=document_id,
        session_id=session_id,
        chain=begins.chain,
        chain_share=begins.share,
        deadline=deadline,
        since=now,
        degrade=degrade,
        ttft_target_s=target_ms / 1000,
        allowed=caller.models,
    )


def _prompt(method: Method, request: Any) -> tuple[int, int]:
    """Bytes to estimate from, or the exact count of tokens where the caller sent ids."""
    if method is Method.COMPLETE and request.WhichOneof("prompt") == "token_ids":
        return 0, len(request.token_ids.ids)
    if method is Method.EMBED and request.token_ids:
        return 0, sum(len(text.ids) for text in request.token_ids)
    return request.ByteSize(), 0


def _features(method: Method, request: Any) -> frozenset[str]:
    """What only some instances can do, in the words that they register."""
    found = []
    if method is Method.CHAT and request.tools and request.tool_choice.mode != lm.ToolChoice.MODE_NONE:
        found.append("tools")
    which = request.constraint.WhichOneof("constraint")
    if which is not None:
        found.append(which)
    if request.sampling.HasField("logprobs"):
        found.append("logprobs")
    if request.sampling.n > 1:
        found.append("n")
    return frozenset(found)


def _check_tokenize(request: Any) -> None:
    if request.WhichOneof("input") is None:
        raise invalid("input", "give either text or chat")


def _check_detokenize(request: Any) -> None:
    if len(request.token_ids) > MAX_DETOKENIZE_IDS:
        raise invalid("token_ids", f"{len(request.token_ids)} entries, at most {MAX_DETOKENIZE_IDS}")


_CHECKS: dict[Method, Callable[[Any], None]] = {
    Method.CHAT: checks.check_chat,
    Method.COMPLETE: checks.check_complete,
    Method.TOKENIZE: _check_tokenize,
    Method.DETOKENIZE: _check_detokenize,
    Method.EMBED: checks.check_embed,
    Method.RERANK: checks.check_rerank,
}
