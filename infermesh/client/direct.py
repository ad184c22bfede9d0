"""Direct mode: what a Pick says of a request, what its answer adds to it, and when to pick again. Pure.

The gateway chooses and reserves, and the client calls the instance itself: answers do not pass the gateway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grpc import RpcError

from infermesh.client.results import Served
from infermesh.errors import TABLE, MeshError, Reason, from_rpc, spoken
from infermesh.transport import Trust
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1 import rerank_pb2 as rr

PICKS = 3  # instances at most that one request is sent to
REPORT_S = 5.0
BROKEN = frozenset({Reason.INSTANCE_LOST, Reason.STREAM_LOST})
# What goes to instances. Everything else is the gateway's: its own methods, answers from passages, bulk embedding.
KINDS: dict[type[Any], str] = {
    lm.ChatRequest: "llm",
    lm.CompleteRequest: "llm",
    em.EmbedRequest: "embedding",
    rr.RerankRequest: "rerank",
}
_SOON = frozenset({Reason.INSTANCE_FULL, Reason.STARTING})  # it may have room again: not avoided


def pick_request(request: Any, avoid: Sequence[str] = ()) -> ms.PickRequest:
    """What routing needs of it; the prompt stays here."""
    made = ms.PickRequest(
        kind=KINDS[type(request)], model=request.model, prompt_bytes=request.ByteSize(), excluded=avoid
    )
    made.hints.CopyFrom(request.hints)
    if isinstance(request, lm.ChatRequest | lm.CompleteRequest):
        made.max_tokens, made.choices = max(0, request.sampling.max_tokens), max(0, request.sampling.n)
        made.features.extend(_features(request))
        if isinstance(request, lm.CompleteRequest) and request.WhichOneof("prompt") == "token_ids":
            made.prompt_tokens = len(request.token_ids.ids)
    elif isinstance(request, em.EmbedRequest) and request.token_ids:
        made.prompt_tokens = sum(len(text.ids) for text in request.token_ids)
    return made


def _features(request: Any) -> list[str]:
    """What only some instances can do, in the words that they register."""
    found = []
    if isinstance(request, lm.ChatRequest) and request.tools and request.tool_choice.mode != lm.ToolChoice.MODE_NONE:
        found.append("tools")
    which = request.constraint.WhichOneof("constraint")
    if which is not None:
        found.append(which)
    if request.sampling.HasField("logprobs"):
        found.append("logprobs")
    if request.sampling.n > 1:
        found.append("n")
    return found


def as_error(picked: ms.PickResponse, error: RpcError, *, got: str = "") -> MeshError:
    """What a failed call of an instance means. `got`: how much of the answer had come, empty = nothing."""
    meant = from_rpc(error)
    if not spoken(error) and meant.reason is Reason.INSTANCE_FULL:  # the library's own: no instance takes it
        meant = MeshError(Reason.REQUEST_TOO_LARGE, meant.message)
    elif not spoken(error) and meant.reason is Reason.INSTANCE_LOST:
        where = f"{picked.instance_id or 'the instance'} at {picked.address}"
        if got:
            meant = MeshError(Reason.STREAM_LOST, f"the connection to {where} broke after {got}: {meant.message}")
        else:
            meant = MeshError(Reason.INSTANCE_LOST, f"{where} cannot be reached: {meant.message}")
    meant.instance_id = meant.instance_id or picked.instance_id
    return meant


class Tries:
    """The instances that one request was sent to."""

    def __init__(self) -> None:
        self.failure: MeshError | None = None  # of the last one
        self.avoid: list[str] = []
        self.count = 0

    def again(self, picked: ms.PickResponse, error: MeshError, *, begun: bool) -> bool:
        """Whether to pick again after this failure: not once the caller has seen some of the answer, nor for a fault
        that is the request's own."""
        self.failure = error
        self.count += 1
        if begun or not TABLE[error.reason].elsewhere or self.count >= PICKS:
            return False
        if error.reason not in _SOON:
            self.avoid.append(picked.address)
        return True

    def told(self, refused: MeshError) -> MeshError:
        """When nobody is left, the caller hears why the last instance failed."""
        nobody = refused.reason is Reason.NO_INSTANCE and self.failure is not None
        return self.failure if nobody and self.failure is not None else refused

    def served(self, who: Served, picked: ms.PickResponse) -> Served:
        return replace(who, attempts=self.count + 1, degraded=picked.degraded_from)


def report(picked: ms.PickResponse, failure: BaseException | None, usage: Any) -> ms.ReportRequest:
    """How the call on a lease ended; `usage` as the instance told it."""
    outcome = "ok" if failure is None else Reason.CANCELLED.value
    if isinstance(failure, MeshError):
        outcome = failure.reason.value
    return ms.ReportRequest(
        lease_id=picked.lease_id,
        outcome=outcome,
        prompt_tokens=getattr(usage, "prompt_tokens", 0),
        completion_tokens=getattr(usage, "completion_tokens", 0),
    )


def metadata(picked: ms.PickResponse) -> tuple[tuple[str, str], ...]:
    return tuple(picked.metadata.items())


def line(picked: ms.PickResponse) -> tuple[str, bool, str]:
    """By what a connection is found again."""
    return picked.address, picked.tls, picked.tls_name


def trusted(picked: ms.PickResponse, tls: Trust | None) -> Trust | None:
    """How to speak to the instance. `tls`: whom the caller trusts."""
    if not picked.tls:
        return None
    known = tls or Trust()
    return known if known.name else replace(known, name=picked.tls_name)
