"""Who calls and under which request id: the same for gRPC and REST."""

from __future__ import annotations

import re
import uuid

from services.chassis.keys import Keys
from services.gateway.upstream.calls import Caller

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")
TRUSTED = Caller(operator=True)


def caller(keys: Keys, authorization: str | None) -> Caller:
    """Whose request it is. A process without keys trusts everybody.

    Raises:
        MeshError: UNAUTHENTICATED.
    """
    key = keys.who(authorization)
    if key is None:
        return TRUSTED
    return Caller(
        tenant=key.tenant,
        klass=key.klass,
        models=key.models,
        operator=key.role == "operator",
        tokens_per_minute=key.tokens_per_minute,
    )


def trace_context(parent: str | None, state: str | None) -> dict[str, str]:
    """A W3C trace context that may travel on; empty for what is none. Callers choose these headers, and an instance
    refuses a call whose headers are too large."""
    if not parent or not _TRACEPARENT.fullmatch(parent):
        return {}
    if not state or not _TRACESTATE.fullmatch(state):
        return {"traceparent": parent}
    return {"traceparent": parent, "tracestate": state}


def request_id(given: str | None) -> str:
    """The caller's own id if it is fit for headers and logs, else a new one."""
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return f"req-{uuid.uuid4().hex}"
