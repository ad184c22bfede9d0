"""Who answers: sent as initial metadata right before the first message, never earlier (a retry is legal until then)."""

from __future__ import annotations

from dataclasses import dataclass

from infermesh.errors import INSTANCE_KEY as INSTANCE_KEY
from infermesh.errors import MODEL_KEY as MODEL_KEY
from services.chassis.rpc import Context

ATTEMPTS_KEY = "x-infermesh-attempts"
DEGRADED_KEY = "x-infermesh-degraded"
REQUEST_KEY = "x-request-id"
RESUMES_KEY = "x-infermesh-resumes"
RESUME_EXACT_KEY = "x-infermesh-resume-exact"


@dataclass(frozen=True, slots=True)
class Identity:
    """One instance in one of its lives."""

    instance_id: str
    incarnation: int
    model: str


async def announce(context: Context, identity: Identity) -> None:
    """Sends the initial metadata of a call. Call it once, right before the first message."""
    pairs = [(INSTANCE_KEY, identity.instance_id), (MODEL_KEY, identity.model)]
    if request_id := metadata_value(context, REQUEST_KEY):
        pairs.append((REQUEST_KEY, request_id))
    await context.send_initial_metadata(pairs)


def metadata_value(context: Context, key: str) -> str | None:
    """The first value of a text key of the caller's metadata."""
    for name, value in context.invocation_metadata() or ():
        if name == key and isinstance(value, str):
            return value
    return None
