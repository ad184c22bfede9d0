"""`infermesh health`, and an instance's state as conditions."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from infermesh.cli import main
from infermesh.cli.instances import conditions
from infermesh.v1.mesh_pb2 import Instance


@pytest.fixture
def served() -> Iterator[tuple[str, health.HealthServicer]]:
    server, servicer = grpc.server(ThreadPoolExecutor(1)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


def test_the_exit_code_says_whether_it_serves(
    served: tuple[str, health.HealthServicer], capsys: pytest.CaptureFixture[str]
) -> None:
    address, servicer = served
    assert main(["health", address]) == 0
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert main(["health", address]) == 1
    assert "not_serving" in capsys.readouterr().err
    assert main(["health", "127.0.0.1:1", "--timeout", "5"]) == 1
    assert "127.0.0.1:1: unavailable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("instance", "accepted", "ready", "draining"),
    [
        (Instance(id="i", state="healthy", since_s=60), "True", "True", "False"),
        (Instance(id="i", state="draining"), "True", "False", "True"),
        (Instance(id="i", state="suspect", why="late"), "True", "Unknown", "False"),
        (Instance(id="i", state="rejected", rejected_reason="no port"), "False", "False", "False"),
    ],
)
def test_a_state_as_conditions(instance: Instance, accepted: str, ready: str, draining: str) -> None:
    told = {one["type"]: one for one in conditions(instance, 1_000_000_060.0)}
    assert {name: one["status"] for name, one in told.items()} == {
        "Accepted": accepted,
        "Ready": ready,
        "Draining": draining,
    }
    assert told["Ready"]["lastTransitionTime"] == ("2001-09-09T01:46:40Z" if instance.since_s else "")
    assert told["Ready"]["message"] == (instance.rejected_reason or instance.why)
