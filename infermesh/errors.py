"""The one error table: our reason <-> gRPC status <-> HTTP status (law 7).

A `MeshError` carries a `Reason` from a closed list. Between processes the reason travels in trailing metadata beside
the gRPC status (`to_trailers`, `from_rpc`), so that nothing is guessed from a status code while both ends are ours.

`dispatched` says whether work may have begun: a request refused before dispatch may go elsewhere at no risk; one that
was lost after it may only go elsewhere while nothing has been sent to the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from grpc import RpcError, StatusCode

REASON_KEY = "x-infermesh-reason"
INSTANCE_KEY = "x-infermesh-instance-id"
MODEL_KEY = "x-infermesh-model-id"
PARAM_KEY = "x-infermesh-param"
RETRY_AFTER_KEY = "retry-after-ms"


_UNFIT = re.compile(r"[^\x20-\x7e]")  # what gRPC takes in no text value


class Reason(StrEnum):
    """Why a request was not answered. The list is closed; spans, logs, headers and tests use these very words."""

    INVALID_ARGUMENT = "invalid_argument"
    UNSUPPORTED = "unsupported"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    OUT_OF_RANGE = "out_of_range"
    REQUEST_TOO_LARGE = "request_too_large"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    RATE_LIMITED = "rate_limited"
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    INSTANCE_FULL = "instance_full"
    NO_INSTANCE = "no_instance"
    STARTING = "starting"
    DRAINING = "draining"
    INSTANCE_LOST = "instance_lost"
    STREAM_LOST = "stream_lost"
    ENGINE_FAILED = "engine_failed"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    UNIMPLEMENTED = "unimplemented"
    FAILED_PRECONDITION = "failed_precondition"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    `elsewhere`: another instance may well answer; `dispatched`: work may have begun when this happened;
    `kind`: the `type` of OpenAI's error object.
    """

    grpc: StatusCode
    http: int
    kind: str
    elsewhere: bool = False
    dispatched: bool = False


_S = StatusCode
TABLE: dict[Reason, Row] = {
    Reason.INVALID_ARGUMENT: Row(_S.INVALID_ARGUMENT, 400, "invalid_request_error"),
    Reason.UNSUPPORTED: Row(_S.INVALID_ARGUMENT, 400, "invalid_request_error"),
    Reason.CONTEXT_LENGTH_EXCEEDED: Row(_S.INVALID_ARGUMENT, 400, "invalid_request_error"),
    Reason.OUT_OF_RANGE: Row(_S.OUT_OF_RANGE, 400, "invalid_request_error", elsewhere=True),
    Reason.REQUEST_TOO_LARGE: Row(_S.RESOURCE_EXHAUSTED, 413, "invalid_request_error"),
    Reason.UNAUTHENTICATED: Row(_S.UNAUTHENTICATED, 401, "authentication_error"),
    Reason.PERMISSION_DENIED: Row(_S.PERMISSION_DENIED, 403, "permission_error"),
    Reason.MODEL_NOT_FOUND: Row(_S.NOT_FOUND, 404, "invalid_request_error"),
    Reason.NOT_FOUND: Row(_S.NOT_FOUND, 404, "invalid_request_error"),
    Reason.RATE_LIMITED: Row(_S.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    Reason.QUEUE_FULL: Row(_S.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    Reason.QUEUE_TIMEOUT: Row(_S.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    Reason.INSTANCE_FULL: Row(_S.RESOURCE_EXHAUSTED, 429, "rate_limit_error", elsewhere=True),
    Reason.NO_INSTANCE: Row(_S.UNAVAILABLE, 503, "service_unavailable_error"),
    Reason.STARTING: Row(_S.UNAVAILABLE, 503, "service_unavailable_error", elsewhere=True),
    Reason.DRAINING: Row(_S.UNAVAILABLE, 503, "service_unavailable_error", elsewhere=True),
    Reason.INSTANCE_LOST: Row(_S.UNAVAILABLE, 503, "service_unavailable_error", elsewhere=True, dispatched=True),
    Reason.STREAM_LOST: Row(_S.UNAVAILABLE, 503, "service_unavailable_error", dispatched=True),
    Reason.ENGINE_FAILED: Row(_S.INTERNAL, 500, "server_error", elsewhere=True, dispatched=True),
    Reason.DEADLINE_EXCEEDED: Row(_S.DEADLINE_EXCEEDED, 504, "timeout_error", dispatched=True),
    Reason.CANCELLED: Row(_S.CANCELLED, 499, "cancelled", dispatched=True),
    Reason.UNIMPLEMENTED: Row(_S.UNIMPLEMENTED, 501, "invalid_request_error"),
    Reason.FAILED_PRECONDITION: Row(_S.FAILED_PRECONDITION, 400, "invalid_request_error"),
    Reason.INTERNAL: Row(_S.INTERNAL, 500, "server_error", dispatched=True),
}

# grpc's word for streams that end with their connection; where that broke by bytes nobody can read, as INTERNAL.
TAKEN_ALONG = "Stream removed"
# What a bare gRPC status means when the other end did not send a reason (a proxy, the library itself, an older peer).
_FROM_STATUS: dict[StatusCode, Reason] = {
    _S.INVALID_ARGUMENT: Reason.INVALID_ARGUMENT,
    _S.OUT_OF_RANGE: Reason.OUT_OF_RANGE,
    _S.UNAUTHENTICATED: Reason.UNAUTHENTICATED,
    _S.PERMISSION_DENIED: Reason.PERMISSION_DENIED,
    _S.NOT_FOUND: Reason.NOT_FOUND,
    _S.RESOURCE_EXHAUSTED: Reason.INSTANCE_FULL,
    _S.UNAVAILABLE: Reason.INSTANCE_LOST,
    _S.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    _S.CANCELLED: Reason.CANCELLED,
    _S.UNIMPLEMENTED: Reason.UNIMPLEMENTED,
    _S.FAILED_PRECONDITION: Reason.FAILED_PRECONDITION,
}


class MeshError(Exception):
    """A request that was not answered, and why.

    `param` is the path of the field at fault (`sampling.max_tokens`), `retry_after_s` when to come again. `instance_id`
    and `model_id` say who was asked last; empty = nobody, or the gateway does not tell.
    """

    def __init__(
        self, reason: Reason, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.instance_id = self.model_id = ""

    def __str__(self) -> str:
        return named(self.message, self.param)

    def __repr__(self) -> str:
        at = f" at {self.param}" if self.param else ""
        return f"MeshError({self.reason.value}{at}: {self.message})"

    @property
    def row(self) -> Row:
        return TABLE[self.reason]


def named(message: str, param: str | None) -> str:
    """The message with the field at fault, unless it speaks of it anyway: many show people nothing but that."""
    if not param or re.search(rf"(?<!\w){re.escape(param)}(?!\w)", message):
        return message
    return f"{param}: {message}"


def invalid(param: str, message: str) -> MeshError:
    """A field of the request is wrong."""
    return MeshError(Reason.INVALID_ARGUMENT, message, param=param)


def unsupported(param: str, message: str) -> MeshError:
    """A field of the request asks for what is not served, by name."""
    return MeshError(Reason.UNSUPPORTED, message, param=param)


def to_trailers(error: MeshError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata of a failed call."""
    pairs = [(REASON_KEY, error.reason.value)]
    if error.param:
        pairs.append((PARAM_KEY, _UNFIT.sub("?", error.param[:256])))
    if error.retry_after_s is not None:
        pairs.append((RETRY_AFTER_KEY, str(max(0, round(error.retry_after_s * 1000)))))
    pairs += [(key, id) for key, id in ((INSTANCE_KEY, error.instance_id), (MODEL_KEY, error.model_id)) if id]
    return tuple(pairs)


def from_status(status: StatusCode, details: str, trailers: Iterable[tuple[str, str | bytes]] = ()) -> MeshError:
    """The error of a failed call, as its server meant it."""
    meta = {key: value for key, value in trailers if isinstance(value, str)}
    try:
        reason = Reason(meta[REASON_KEY])
    except (KeyError, ValueError):
        reason = _FROM_STATUS.get(status, Reason.INTERNAL)
        if status is _S.INTERNAL and details.startswith(TAKEN_ALONG):
            reason = Reason.INSTANCE_LOST
    after = meta.get(RETRY_AFTER_KEY, "")
    error = MeshError(
        reason,
        details or reason.value,
        param=meta.get(PARAM_KEY),
        retry_after_s=int(after) / 1000 if after.isdecimal() else None,
    )
    error.instance_id, error.model_id = meta.get(INSTANCE_KEY, ""), meta.get(MODEL_KEY, "")
    return error


def from_rpc(error: RpcError) -> MeshError:
    """The same for the exception that grpc raises (both `grpc` and `grpc.aio`)."""
    code = getattr(error, "code", lambda: StatusCode.UNKNOWN)()
    details = getattr(error, "details", lambda: "")() or ""
    return from_status(code, details, _trailers(error))


def spoken(error: RpcError) -> bool:
    """Did the other end name the reason? Otherwise the status is the grpc library's own, or a proxy's."""
    return any(key == REASON_KEY for key, _ in _trailers(error))


def _trailers(error: RpcError) -> list[tuple[str, str | bytes]]:
    return [(item[0], item[1]) for item in getattr(error, "trailing_metadata", lambda: ())() or ()]
