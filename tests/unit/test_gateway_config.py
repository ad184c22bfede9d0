"""Bad configuration is refused with all its faults at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from infermesh.errors import MeshError, Reason
from services.gateway.config import gateway_settings, is_loopback
from services.gateway.upstream.quota import Quota


def test_every_fault_is_told_with_its_path() -> None:
    with pytest.raises(ValueError) as caught:
        gateway_settings(
            grpc="nowhere",
            log_level="loud",
            limits={"max_body": 1, "max_streams": 0},
            registry="etcd://x",
            weights={"a": 0},
        )
    lines = str(caught.value).splitlines()
    assert {line.split(":")[0] for line in lines} == {
        *("grpc", "log_level", "limits.max_body", "limits.max_streams", "registry", "weights.a"),
    }


@pytest.mark.parametrize("where", ["grpc", "http"])
def test_beyond_loopback_needs_keys_or_the_word(where: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{where} would listen beyond loopback"):
        gateway_settings(**{where: "0.0.0.0:5000"})
    assert gateway_settings(**{where: "0.0.0.0:5000"}, insecure=True)
    assert gateway_settings(**{where: "[::]:5000"}, keys=tmp_path / "keys.yaml")
    assert gateway_settings(**{where: "[::1]:5000"})


def test_loopback_names() -> None:
    assert is_loopback("127.0.0.1:1") and is_loopback("localhost:1") and is_loopback("[::1]:1") and is_loopback("")
    assert not is_loopback("10.0.0.1:1") and not is_loopback("host.example:1")


def test_quota_reserves_refills_and_settles() -> None:
    quota = Quota()
    assert quota.reserve("t", 600, 500, 0.0) == 500
    with pytest.raises(MeshError) as caught:
        quota.reserve("t", 600, 200, 1.0)
    assert caught.value.reason is Reason.RATE_LIMITED
    assert caught.value.retry_after_s == pytest.approx(9.0)  # 110 there, 200 needed, 10 a second
    quota.settle("t", 500, 100)
    assert quota.reserve("t", 600, 200, 1.0) == 200
    assert quota.reserve("other", 600, 10_000, 0.0) == 600  # larger than a minute: all of a full bucket
    assert quota.reserve("free", 0, 10_000, 0.0) == 0
