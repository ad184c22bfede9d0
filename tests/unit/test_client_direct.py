"""What clients tell of a request in direct mode is what a gateway would have seen in it; and when they pick again."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError

from infermesh.client import requests
from infermesh.client.direct import PICKS, Tries, as_error, pick_request, report, trusted
from infermesh.client.results import Served
from infermesh.errors import MeshError, Reason
from infermesh.transport import Trust
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import mesh_pb2 as ms
from services.gateway.front.direct import wanted
from services.gateway.upstream.calls import Caller, Method
from services.gateway.upstream.describe import describe
from tests.kit.failures import CORRUPTED, failed

PICKED = ms.PickResponse(lease_id="l", instance_id="a", address="10.0.0.1:5", degraded_from="big")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
HINTS = {"session_id": "s", "document_id": "d", "priority": -3, "degrade": False, "ttft_target_ms": 300}


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        (Method.CHAT, requests.chat_request("hello", "m", {"max_tokens": 7, **HINTS})),
        (Method.CHAT, requests.chat_request("hello", "m", {"n": 3, "logprobs": 2, "regex": "a+"})),
        (Method.CHAT, requests.chat_request("hello", "m", {}, tools=[TOOL])),
        (Method.CHAT, requests.chat_request("hello", "m", {}, tools=[TOOL], tool_choice="none")),
        (Method.CHAT, requests.chat_request("hello", "m", {"json_schema": {}, "degrade": True})),
        (Method.COMPLETE, requests.complete_request("once", "m", {"choice": ["a"]})),
        (Method.COMPLETE, requests.complete_request([1, 2, 3], "m", {"max_tokens": 1})),
        (Method.EMBED, requests.embed_request(["one", "two"], "m")),
        (Method.EMBED, requests.embed_request([[1, 2], [3]], "m")),
        (Method.RERANK, requests.rerank_request("q", ["a", "b"], "m")),
    ],
)
def test_routing_hears_of_it_what_it_would_have_seen(method: Method, request_: Any) -> None:
    seen = describe(method, request_, Caller(), 0.0, 0.0)
    told = wanted(pick_request(request_), Caller())
    for name in (
        *("kind", "model", "prompt_tokens", "counted", "max_tokens", "choices", "features", "slots", "priority"),
        *("document_id", "session_id", "degrade", "ttft_target_s"),
    ):
        assert getattr(told, name) == getattr(seen, name), name
    assert seen.counted or told.prompt_bytes == seen.prompt_bytes > 0
    assert b"hello" not in pick_request(request_).SerializeToString(), "the prompt stays where it is"


def test_it_is_picked_again_only_where_another_instance_may_answer() -> None:
    tries = Tries()
    lost = as_error(PICKED, failed(grpc.StatusCode.UNAVAILABLE, "refused"))
    assert lost.reason is Reason.INSTANCE_LOST and "a at 10.0.0.1:5 cannot be reached" in str(lost)
    assert tries.again(PICKED, lost, begun=False) and tries.avoid == ["10.0.0.1:5"]
    full = as_error(PICKED, failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "instance_full"))
    assert tries.again(PICKED, full, begun=False) and len(tries.avoid) == 1, "it may have room again"
    assert tries.served(Served(), PICKED) == Served(attempts=3, degraded="big")
    assert not tries.again(PICKED, lost, begun=False) and tries.count == PICKS
    nobody, late = MeshError(Reason.NO_INSTANCE, "none left"), MeshError(Reason.QUEUE_FULL, "full")
    assert tries.told(nobody) is lost and tries.told(late) is late and Tries().told(nobody) is nobody


@pytest.mark.parametrize(
    ("raised", "got", "reason"),
    [
        (failed(grpc.StatusCode.UNAVAILABLE), "3 tokens", Reason.STREAM_LOST),
        (failed(grpc.StatusCode.INTERNAL, CORRUPTED), "3 tokens", Reason.STREAM_LOST),
        (failed(grpc.StatusCode.RESOURCE_EXHAUSTED), "", Reason.REQUEST_TOO_LARGE),
        (failed(grpc.StatusCode.INVALID_ARGUMENT, "said", "unsupported"), "", Reason.UNSUPPORTED),
        (failed(grpc.StatusCode.UNAUTHENTICATED, "said", "unauthenticated"), "", Reason.UNAUTHENTICATED),
        (failed(grpc.StatusCode.DEADLINE_EXCEEDED), "", Reason.DEADLINE_EXCEEDED),
    ],
)
def test_what_no_other_instance_mends_is_told_at_once(raised: AioRpcError, got: str, reason: Reason) -> None:
    error = as_error(PICKED, raised, got=got)
    assert error.reason is reason and error.instance_id == "a"
    assert not Tries().again(PICKED, error, begun=False)


def test_reports_use_the_words_of_the_error_table() -> None:
    usage = inf.Usage(prompt_tokens=5, completion_tokens=3)
    done = ms.ReportRequest(lease_id="l", outcome="ok", prompt_tokens=5, completion_tokens=3)
    assert report(PICKED, None, usage) == done
    assert report(PICKED, MeshError(Reason.STREAM_LOST, ""), None).outcome == "stream_lost"
    assert report(PICKED, KeyboardInterrupt(), None).outcome == "cancelled"


def test_the_callers_own_name_for_certificates_goes_first() -> None:
    over_tls = ms.PickResponse(tls=True, tls_name="mesh.internal")
    assert trusted(PICKED, Trust(b"ca")) is None
    assert trusted(over_tls, Trust(b"ca")) == Trust(b"ca", "mesh.internal")
    assert trusted(over_tls, Trust(b"ca", "mine")) == Trust(b"ca", "mine")
