"""Bad configuration is refused with all its faults at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from infermesh.errors import MeshError, Reason
from registry.port import RegistryError
from services.chassis.registering import connect_registry
from services.gateway.config import gateway_settings
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


@pytest.mark.parametrize(
    ("routing", "told"),
    [
        ({"fallbacks": {"a": "a"}}, "fallbacks.a: goes in a circle: a -> a"),
        ({"fallbacks": {"a": "b", "b": "c", "c": "a"}}, "fallbacks.a: goes in a circle: a -> b -> c -> a"),
        ({"fallbacks": {"x": "b"}, "aliases": {"x": [{"model": "a"}]}}, "fallbacks.x: 'x' is a weighted alias"),
        ({"fallbacks": {"a": "x"}, "aliases": {"x": [{"model": "a"}]}}, "fallbacks.a: 'x' is a weighted alias"),
        ({"aliases": {"x": [{"model": "y"}], "y": [{"model": "a"}]}}, "aliases.x: 'y' is an alias, not a model"),
        ({"aliases": {"x": [{"model": "a"}, {"model": "a"}]}}, "aliases.x: names a model twice"),
        ({"aliases": {"x": [{"model": "a", "weight": -1}]}}, "routing.aliases.x.0.weight: "),
        ({"tpot_ms": -1}, "routing.tpot_ms: "),
    ],
)
def test_routing_that_contradicts_itself(routing: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match="routing") as caught:
        gateway_settings(routing=routing)
    assert told in str(caught.value)


def test_a_way_into_a_circle_is_not_told_as_one() -> None:
    with pytest.raises(ValueError, match=r"fallbacks\.b: goes in a circle: b -> c -> b; ") as caught:
        gateway_settings(routing={"fallbacks": {"a": "b", "b": "c", "c": "b"}})
    assert "fallbacks.a" not in str(caught.value)


def test_fallbacks_in_a_chain_are_no_circle() -> None:
    chain = {"a": "b", "b": "c"}
    assert gateway_settings(routing={"fallbacks": chain}).routing.fallbacks == chain


@pytest.mark.parametrize("where", ["grpc", "http"])
def test_beyond_loopback_needs_keys_or_the_word(where: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{where}: 0\.0\.0\.0 can be reached from other machines: give --keys FILE"):
        gateway_settings(**{where: "0.0.0.0:5000"})
    assert gateway_settings(**{where: "0.0.0.0:5000"}, insecure=True)
    assert gateway_settings(**{where: "[::]:5000"}, keys=tmp_path / "keys.yaml")
    assert gateway_settings(**{where: "[::1]:5000"})


def test_a_registry_with_its_files(tmp_path: Path) -> None:
    """The gateway reaches its registry as every other process does, Consul's TLS included."""
    given = gateway_settings(registry="consuls://10.0.0.1", registry_prefix="blue", registry_ca_file=tmp_path / "ca")
    with pytest.raises(RegistryError, match="file cannot be read"):
        connect_registry(given)
    with pytest.raises(ValueError, match=r"registry: 'consul://a,b': one address"):
        gateway_settings(registry="consul://a,b")


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
