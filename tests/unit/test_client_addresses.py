"""What a client makes of a gateway's failure: another one is asked, or the caller is told."""

import grpc
import pytest
from grpc.aio import AioRpcError

from infermesh.client.addresses import as_error, try_next
from infermesh.errors import Reason
from tests.kit.failures import CORRUPTED, failed


@pytest.mark.parametrize(
    ("error", "another"),
    [
        (failed(grpc.StatusCode.UNAVAILABLE, "connection refused"), True),
        (failed(grpc.StatusCode.INTERNAL, CORRUPTED), True),
        (failed(grpc.StatusCode.UNAVAILABLE, "going", "draining"), True),
        (failed(grpc.StatusCode.UNAVAILABLE, "none is left", "no_instance"), False),
        (failed(grpc.StatusCode.UNAVAILABLE, "it died", "instance_lost"), False),
        (failed(grpc.StatusCode.INTERNAL, "a fault"), False),
        (failed(grpc.StatusCode.DEADLINE_EXCEEDED), False),
        (failed(grpc.StatusCode.INVALID_ARGUMENT, "n", "invalid_argument"), False),
    ],
)
def test_another_gateway_is_asked_when_this_one_was_not_reached_or_leaves(error: AioRpcError, another: bool) -> None:
    assert try_next(error) is another


@pytest.mark.parametrize("error", [failed(grpc.StatusCode.UNAVAILABLE), failed(grpc.StatusCode.INTERNAL, CORRUPTED)])
def test_a_broken_connection_is_told_by_how_far_it_got(error: AioRpcError) -> None:
    assert as_error(error, ["a:1", "b:2"]).reason is Reason.NO_INSTANCE
    lost = as_error(error, ["a:1", "b:2"], got="3 tokens")
    assert lost.reason is Reason.STREAM_LOST and "3 tokens" in lost.message


def test_what_the_gateway_said_is_passed_on() -> None:
    told = as_error(failed(grpc.StatusCode.INTERNAL, "it failed", "engine_failed"), ["a:1"])
    assert (told.reason, told.message) == (Reason.ENGINE_FAILED, "it failed")
