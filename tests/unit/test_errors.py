import grpc
import grpc.aio
import pytest

from infermesh.errors import TABLE, MeshError, Reason, from_rpc, from_status, to_trailers
from services.chassis.rpc import abort, details
from tests.kit.failures import CORRUPTED, failed


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


def test_a_connection_that_broke_by_unreadable_bytes_is_no_fault_of_a_server():
    assert from_rpc(failed(grpc.StatusCode.INTERNAL, CORRUPTED)).reason is Reason.INSTANCE_LOST
    assert from_rpc(failed(grpc.StatusCode.INTERNAL, CORRUPTED, "internal")).reason is Reason.INTERNAL


def test_an_unknown_reason_of_a_newer_peer_falls_back_to_the_status():
    error = from_status(grpc.StatusCode.UNAVAILABLE, "x", [("x-infermesh-reason", "from_the_future")])
    assert error.reason is Reason.INSTANCE_LOST


def test_what_may_go_elsewhere_was_not_the_callers_fault():
    for reason, row in TABLE.items():
        if row.elsewhere:
            assert row.http in (400, 429, 500, 503), reason
            assert reason is Reason.OUT_OF_RANGE or row.http != 400


def test_a_path_with_unfit_characters_still_travels():
    trailers = dict(to_trailers(MeshError(Reason.INVALID_ARGUMENT, "x", param="tools[0].\nname\x00é" + "x" * 999)))
    assert trailers["x-infermesh-param"].startswith("tools[0].?name??x")
    assert len(trailers["x-infermesh-param"]) == 256


async def test_a_message_of_any_length_and_script_arrives():
    async def refuse(request, context):
        await abort(context, MeshError(Reason.UNSUPPORTED, "模型" * 3000, param="model"))

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(refuse)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", {"m": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/s/m")(b"")
    await server.stop(0)
    error = from_rpc(caught.value)
    assert (error.reason, error.param) == (Reason.UNSUPPORTED, "model")
    assert error.message.startswith("模型模型") and len(error.message) > 400


def test_plain_text_is_not_cut_short():
    assert details("a" * 4096) == "a" * 4096 and len(details("a%" * 4096)) == 2048


@pytest.mark.parametrize(
    ("message", "param", "told"),
    [
        ("0 is out of range: 1 .. 128", "n", "n: 0 is out of range: 1 .. 128"),
        ("model 'x' is not served", "model", "model 'x' is not served"),
        ("must not be empty", "stop[0]", "stop[0]: must not be empty"),
        ("stop[0] is empty", "stop[0]", "stop[0] is empty"),
        ("gone", None, "gone"),
    ],
)
def test_as_text_an_error_names_its_field_once(message: str, param: str | None, told: str) -> None:
    error = MeshError(Reason.INVALID_ARGUMENT, message, param=param)
    assert str(error) == told and error.message == message
