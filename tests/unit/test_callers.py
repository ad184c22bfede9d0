"""Who calls, under which id and trace: the same at both doors."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from infermesh.errors import MeshError, Reason
from services.chassis.keys import Key, Keys
from services.gateway.entrance import Entrance
from services.gateway.front.callers import request_id, trace_context
from services.gateway.front.rpc import Door
from services.gateway.upstream.calls import Call

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

ENTRANCE = Entrance("infermesh.v1.EmbeddingService/EmbedStream")


class Context:
    def __init__(self, *metadata: tuple[str, str]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def time_remaining(self) -> None:
        return None


class Watcher:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Reason, str]] = []

    def refused(self, method: str, error: MeshError, call: Call, took_s: float = 0.0) -> None:
        assert call.entrance is not None
        self.seen.append((call.entrance.front, method, error.reason, call.request_id))

    def root(self, call: Call) -> None:
        return None


@pytest.mark.parametrize(
    ("parent", "state", "travels"),
    [
        (PARENT, "k=v", {"traceparent": PARENT, "tracestate": "k=v"}),
        (PARENT, None, {"traceparent": PARENT}),
        (PARENT, "k=" + "v" * 600, {"traceparent": PARENT}),
        (PARENT, "k=v\r\nx: y", {"traceparent": PARENT}),
        (PARENT + "\n", "k=v", {}),
        ("junk", "k=v", {}),
        (None, "k=v", {}),
    ],
)
def test_only_a_trace_context_travels(parent: str | None, state: str | None, travels: dict[str, str]) -> None:
    assert trace_context(parent, state) == travels


async def test_a_grpc_call_carries_what_fits() -> None:
    door: Any = Door(None, Keys(), None)  # type: ignore[arg-type]
    call = door.call(
        "chat", ENTRANCE, Context(("traceparent", "x" * 7000), ("tracestate", "k=v"), ("x-request-id", "mine"))
    )
    assert (call.trace, call.request_id, call.deadline) == ({}, "mine", None)
    assert door.call("chat", ENTRANCE, Context(("traceparent", PARENT))).trace == {"traceparent": PARENT}


async def test_whoever_may_not_call_is_counted_for_every_method() -> None:
    watcher = Watcher()
    keys = Keys((Key(sha256=hashlib.sha256(b"right").hexdigest(), tenant="acme"),))
    door: Any = Door(None, keys, watcher)  # type: ignore[arg-type]
    with pytest.raises(MeshError):
        door.call("embed_stream", ENTRANCE, Context(("authorization", "Bearer wrong")))
    ((front, name, reason, id),) = watcher.seen
    assert (front, name, reason) == ("grpc", "embed_stream", Reason.UNAUTHENTICATED) and id.startswith("req-")
    assert door.call("embed_stream", ENTRANCE, Context(("authorization", "Bearer right"))).caller.tenant == "acme"


@pytest.mark.parametrize("given", ["", "a b", "é", "x\n", "x" * 129, None])
def test_an_id_unfit_for_headers_and_logs_is_replaced(given: str | None) -> None:
    assert request_id(given).startswith("req-")
    assert request_id("a-Z.0:9_") == "a-Z.0:9_"
