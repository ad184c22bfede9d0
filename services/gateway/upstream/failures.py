"""What a failed call means, whatever grpc raised. Pure."""

from __future__ import annotations

import asyncio
import re

import grpc.aio
from google.protobuf.message import DecodeError

from infermesh.errors import MeshError, Reason, from_rpc, spoken
from services.chassis.rpc import as_mesh_error
from services.gateway.report import OK
from services.gateway.routing import failover
from services.gateway.routing.decision import Refuse
from services.gateway.routing.facts import End

PROMPT_TOKENS_KEY = "x-infermesh-prompt-tokens"
_COUNT = re.compile(r"\d+")


def we_were_cancelled(error: BaseException) -> bool:
    """grpc raises CancelledError also when a channel closes under a call; only our own task's counts."""
    if not isinstance(error, asyncio.CancelledError):
        return False
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def as_failure(error: BaseException) -> MeshError:
    """The failure of an attempt as a typed error."""
    if isinstance(error, grpc.aio.AioRpcError):
        failure = from_rpc(error)
        if failure.reason is Reason.INSTANCE_FULL and not spoken(error):
            # The library's own RESOURCE_EXHAUSTED: a message over its limit. No other instance would take it either.
            return MeshError(Reason.REQUEST_TOO_LARGE, failure.message)
        if failure.reason is Reason.INSTANCE_LOST and not spoken(error):
            return MeshError(Reason.INSTANCE_LOST, f"the connection to the instance broke: {failure.message}")
        return failure
    if isinstance(error, asyncio.CancelledError):
        return MeshError(Reason.INSTANCE_LOST, "the connection to the instance was closed")
    if isinstance(error, DecodeError):
        return MeshError(Reason.INSTANCE_LOST, "the instance's answer cannot be decoded")
    return as_mesh_error(error)


def exact_prompt_tokens(error: BaseException, failure: MeshError) -> int:
    """The count that an instance gave with OUT_OF_RANGE; 0 = none."""
    if isinstance(error, grpc.aio.AioRpcError):
        for key, value in error.trailing_metadata() or ():
            if key == PROMPT_TOKENS_KEY and isinstance(value, str) and value.isdecimal():
                return int(value)
    found = _COUNT.search(failure.message)
    return int(found.group()) if found else 0


def stream_lost(failure: MeshError, instance_id: str, tokens: int, events: int, obstacle: str = "") -> MeshError:
    """The end of a stream that had begun: says how far it got, and (`obstacle`) why nobody goes on with it. The
    caller's own endings stay what they are."""
    if failure.reason in (Reason.DEADLINE_EXCEEDED, Reason.CANCELLED):
        return failure
    got = f"{tokens} tokens" if tokens or not events else f"{events} events"
    message = f"the stream from {instance_id} was lost after {got}: {failure.message}"
    if obstacle:
        message += f"; it cannot be resumed: {obstacle}"
    return MeshError(Reason.STREAM_LOST, message, retry_after_s=failure.retry_after_s)


def refusal(refuse: Refuse, failure: MeshError | None) -> MeshError:
    """When nobody is left, the caller hears why the last attempt failed, unless that was the attempt's own business."""
    if failure is not None and refuse.reason is Reason.NO_INSTANCE:
        if failure.reason is Reason.OUT_OF_RANGE:
            return MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, failure.message, param=failure.param or "messages")
        if failure.reason not in failover.FREE:
            return failure
    return MeshError(refuse.reason, refuse.message, param=_at_fault(refuse), retry_after_s=refuse.retry_after_s)


def _at_fault(refuse: Refuse) -> str | None:
    """The field that nobody serves, as far as it is one."""
    if refuse.reason is Reason.MODEL_NOT_FOUND:
        return "model"
    words = {word for _, word in refuse.record.rejected} if refuse.reason is Reason.UNSUPPORTED else set()
    features = sorted(word.removeprefix("feature:") for word in words if word.startswith("feature:"))
    return _FIELDS.get(features[0], f"constraint.{features[0]}") if features else None


_FIELDS = {"tools": "tools", "logprobs": "sampling.logprobs", "n": "sampling.n"}  # other features are constraints


_ENDS = {
    Reason.INSTANCE_LOST: End.LOST,
    Reason.STREAM_LOST: End.LOST,
    Reason.ENGINE_FAILED: End.FAILED,
    Reason.INTERNAL: End.FAILED,
    Reason.CANCELLED: End.CANCELLED,
    Reason.DEADLINE_EXCEEDED: End.CANCELLED,
}


def end(failure: BaseException | None) -> End:
    if failure is None:
        return End.DONE
    return _ENDS.get(failure.reason, End.REFUSED) if isinstance(failure, MeshError) else End.CANCELLED


def word(failure: BaseException | None) -> str:
    if failure is None:
        return OK
    return failure.reason.value if isinstance(failure, MeshError) else Reason.CANCELLED.value
