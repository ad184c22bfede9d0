"""Failed calls as grpc raises them."""

from __future__ import annotations

import grpc
from grpc.aio import AioRpcError, Metadata

from infermesh.errors import REASON_KEY

# grpc's own words for a stream whose connection met bytes that cannot be read, under INTERNAL.
CORRUPTED = "Stream removed (Unwrap failed (TSI_DATA_CORRUPTED))"


def failed(code: grpc.StatusCode, details: str = "", reason: str = "") -> AioRpcError:
    """`reason`: what a server of ours says of it; empty = the library's own error."""
    return AioRpcError(code, Metadata(), Metadata((REASON_KEY, reason)) if reason else Metadata(), details)
