"""Who may call a model service, and for which model: the same door for every kind of instance."""

from __future__ import annotations

from typing import Any

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1.inference_pb2 import Relay
from services.chassis.checks import check_relay
from services.chassis.identity import metadata_value
from services.chassis.keys import Keys
from services.chassis.rpc import Context


def admit(request: Any, context: Context, keys: Keys, served: frozenset[str]) -> Relay | None:
    """The request's relay, if it came through a gateway, or on a lease that one gave (direct mode).

    Raises:
        MeshError: UNAUTHENTICATED, PERMISSION_DENIED, INVALID_ARGUMENT for a `relay` that is not a gateway's,
            MODEL_NOT_FOUND.
    """
    relay: Relay | None = request.relay if request.HasField("relay") else None
    authorization = metadata_value(context, "authorization")
    lent = keys.lent(authorization)
    if lent is not None and (relay is None or Relay.FromString(lent) != relay):
        raise invalid("relay", "must be the one of the Pick that this pass is from")
    key = keys.who(authorization) if lent is None else None
    if relay is not None:
        if key is not None and key.role != "operator":
            raise invalid("relay", "is set by gateways only, which carry the operator's key")
        check_relay(relay)
    if key is not None and key.models and request.model not in key.models:
        raise MeshError(Reason.PERMISSION_DENIED, f"this API key is not for the model {request.model!r}")
    model = (relay.served_model if relay is not None else "") or request.model
    if model not in served:
        raise MeshError(
            Reason.MODEL_NOT_FOUND,
            f"the model {model!r} is not served here; {', '.join(sorted(served))} is",
            param="model",
        )
    return relay
