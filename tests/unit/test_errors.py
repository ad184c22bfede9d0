import grpc
import pytest

from infermesh.errors import TABLE, MeshError, Reason, from_status, to_trailers


def test_every_reason_has_a_row():
    assert set(TABLE) == set(Reason)


@pytest.mark.parametrize("reason", list(Reason))
def test_a_reason_survives_the_wire(reason):
    sent = MeshError(reason, "what happened", param="sampling.n", retry_after_s=1.5)
    got = from_status(sent.row.grpc, sent.message, to_trailers(sent))
    assert (got.reason, got.message, got.param, got.retry_after_s) == (reason, "what happened", "sampling.n", 1.5)


@pytest.mark.parametrize(
    ("status", "reason", "http"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_ARGUMENT, 400),
        (grpc.StatusCode.UNAUTHENTICATED, Reason.UNAUTHENTICATED, 401),
        (grpc.StatusCode.PERMISSION_DENIED, Reason.PERMISSION_DENIED, 403),
        (grpc.StatusCode.NOT_FOUND, Reason.NOT_FOUND, 404),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.INSTANCE_FULL, 429),
        (grpc.StatusCode.UNAVAILABLE, Reason.INSTANCE_LOST, 503),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED, 504),
        (grpc.StatusCode.DATA_LOSS, Reason.INTERNAL, 500),
    ],
)
def test_a_bare_status_has_a_meaning(status, reason, http):
    error = from_status(status, "")
    assert error.reason is reason
    assert error.row.http == http


def test_an_unknown_reason_of_a_newer_peer_falls_back_to_the_status():
    error = from_status(grpc.StatusCode.UNAVAILABLE, "x", [("x-infermesh-reason", "from_the_future")])
    assert error.reason is Reason.INSTANCE_LOST


def test_what_may_go_elsewhere_was_not_the_callers_fault():
    for reason, row in TABLE.items():
        if row.elsewhere:
            assert row.http in (400, 429, 500, 503), reason
            assert reason is Reason.OUT_OF_RANGE or row.http != 400
