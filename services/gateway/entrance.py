"""Where a request came in, and what its status is there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

from infermesh.errors import TABLE, Reason
from services.chassis import telemetry_names as names


class Entrance:
    """A way into the gateway. `method`: of HTTP, or empty for gRPC. `path`: /v1/embeddings, or package.Service/Method;
    empty = none that is served. Made once for each: callers choose neither."""

    __slots__ = ("attributes", "front", "path", "title")

    def __init__(self, path: str, method: str = "") -> None:
        self.path = path
        self.front = "rest" if method else "grpc"
        self.title = f"{method} {path}".strip()
        self.attributes = (
            {names.HTTP_METHOD: method, **({names.HTTP_ROUTE: path} if path else {})}
            if method
            else {names.RPC_SYSTEM: "grpc", names.RPC_METHOD: path}
        )

    def status(self, outcome: str, begun: bool = False) -> dict[str, str | int]:
        """The attribute that tells how it went. `outcome`: `ok` or the word of a Reason. `begun`: the answer had, which
        over HTTP is a 200 whatever comes."""
        return _status(self.front, "ok" if begun and self.front == "rest" else outcome)


class Arrival(Protocol):
    """A request as it came in: `upstream.calls.Call`. `trace`: W3C headers; no `entrance` = a part of another one."""

    @property
    def request_id(self) -> str: ...

    @property
    def trace(self) -> Mapping[str, str]: ...

    @property
    def entrance(self) -> Entrance | None: ...


@lru_cache(128)
def _status(front: str, outcome: str) -> dict[str, str | int]:
    row = None if outcome == "ok" else TABLE[Reason(outcome)]
    if front == "rest":
        return {names.HTTP_STATUS: row.http if row else 200}
    return {names.RPC_STATUS: row.grpc.name if row else "OK"}
