"""Endpoint values <-> metadata, and the addresses that registries and advertisements may hold."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.address import open_registry, parse_url, split_address
from registry.advertise import advertised, route_to
from registry.consul import ConsulRegistry, Tls
from registry.embedded import MeshRegistry
from registry.endpoint import (
    CONTRACT,
    Capacity,
    Endpoint,
    Hardware,
    Rejected,
    Speed,
    from_metadata,
    to_metadata,
    undialable,
    unusable_id,
)
from registry.port import RegistryError

PLAIN = Endpoint("a", "llm", "10.0.0.1", 80, "m")
words = st.text(st.characters(categories=("L", "N", "P"), exclude_characters=","), max_size=40)
rates = st.none() | st.floats(1, 1e8)


@given(
    incarnation=st.integers(0, 2**64 - 1),
    model=words.filter(bool),
    aliases=st.lists(words.filter(bool), max_size=3).map(tuple),
    zone=words,
    speed=st.builds(Speed, rates, rates, rates, rates, rates, rates, st.sampled_from(["prior", "observed"])).filter(
        lambda s: not (s.step_ms and s.step_ms > 1e6) and not (s.fixed_ms and s.fixed_ms > 1e6)
    ),
    weight=st.floats(0.001, 1000),
    tier=st.sampled_from(["primary", "long-context", "fallback"]),
    extra=st.dictionaries(st.from_regex(r"x[A-Za-z0-9_-]{1,20}", fullmatch=True), words.filter(bool), max_size=4),
)
def test_metadata_says_everything(**fields: object) -> None:
    endpoint = replace(PLAIN, **fields)  # type: ignore[arg-type]
    assert from_metadata("a", "llm", "10.0.0.1", 80, to_metadata(endpoint)) == endpoint


@given(st.dictionaries(st.sampled_from([*to_metadata(PLAIN), "contract", "speed_source", "weight"]), st.text()))
def test_no_metadata_is_too_strange(metadata: dict[str, str]) -> None:
    read = from_metadata("a", "llm", "10.0.0.1", 80, {"contract": CONTRACT, "model": "m", **metadata})
    assert isinstance(read, Endpoint | Rejected)
    if isinstance(read, Rejected):
        assert read.reason and read.reason.isprintable() and len(read.reason) <= 200


def test_defaults_are_unknown_and_not_zero() -> None:
    read = from_metadata("a", "llm", "10.0.0.1", 80, {"contract": CONTRACT, "model": "m"})
    assert read == PLAIN
    assert isinstance(read, Endpoint) and read.speed.prefill_tps is None


def test_the_whole_of_it_fits_a_registry() -> None:
    full = replace(
        PLAIN,
        incarnation=1,
        aliases=("b",),
        engine="e",
        engine_version="1",
        dtype="fp16",
        quantization="q",
        hardware=Hardware("d", 1, 1, 1, 1),
        speed=Speed(1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
        capacity=Capacity(1, 1, 1, 1, 1),
        zone="z",
        weights_version="w",
        tokenizer_digest="t",
        template_digest="p",
        features=frozenset({"n"}),
        pid=1,
        version="1",
    )
    assert len(to_metadata(full)) <= 48, "room for 16 keys of the future"


@pytest.mark.parametrize(
    "changes",
    [{"zone": "x" * 513}, {"zone": "a\nb"}, {"extra": {"a.b": "1"}}, {"extra": {f"k{n}": "" for n in range(64)}}],
)
def test_what_no_registry_carries_is_an_error(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        to_metadata(replace(PLAIN, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "host",
    [
        *("0.0.0.0", "::", "169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "224.0.0.1", "100.100.100.200"),
        *("2852039166", "0xa9fea9fe", "169.254.43518", "0xa9.0xfe.0xa9.0xfe", "fd00:ec2::254", "1.2.3.4.5"),
        *("", "a b", "a/b", "a@b", "host:1", "\uff11\uff10.example", "x" * 254),
    ],
)
def test_addresses_that_nobody_should_dial(host: str) -> None:
    assert undialable(host, 80)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "::1", "10.1.2.3", "fd00::1", "gpu-1", "gpu-1.example.com", "a_b", "e1.x2"]
)
def test_addresses_that_are_fine(host: str) -> None:
    assert undialable(host, 80) == ""
    assert undialable(host, 0) and undialable(host, 65536) and undialable(host, -1)
    assert undialable(host, 22) and undialable(host, 6379) and not undialable(host, 50051)


def test_ids() -> None:
    assert not any(map(unusable_id, ["a", "llm-10.0.0.1-80", "llm-fd00::1-80", "A_b", "x" * 128]))
    assert all(map(unusable_id, ["", "-a", "a b", "a\n", "a/b", "x" * 129, "\u00e9"]))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "consul://"),
        ("http://h:1", "consul://"),
        ("consul:h", "consul://"),
        ("consul://", "HOST:PORT"),
        ("consul://h:99999", "1 .. 65535"),
        ("consul://a:1,b:1", "local agent"),
        ("consul://h:1/x", "only hosts"),
        ("consul://tok@h:1", "only hosts"),
        ("mesh://h", "1 .. 65535"),
        ("mesh://a:1,a:1", "twice"),
        ("mesh://fd00::1", "brackets"),
    ],
)
def test_bad_addresses_say_what_is_allowed(url: str, why: str) -> None:
    with pytest.raises(RegistryError, match=why):
        open_registry(url)


def test_good_addresses() -> None:
    assert parse_url("consul://h") == ("consul", (("h", 8500),))
    assert parse_url("consuls://h/") == ("consuls", (("h", 8501),))
    assert parse_url("mesh://a:1,[::1]:2") == ("mesh", (("a", 1), ("::1", 2)))
    assert isinstance(open_registry("consul://h:1", token="t"), ConsulRegistry)
    assert isinstance(open_registry("mesh://h:1", operator_key="k"), MeshRegistry)
    with pytest.raises(RegistryError, match="consuls"):
        open_registry("consul://h:1", tls=Tls())
    with pytest.raises(RegistryError, match="cannot be read"):
        open_registry("consul://h:1", token_file="/nowhere/token")
    with pytest.raises(RegistryError, match="cannot be read"):
        open_registry("consuls://h:1", tls=Tls(ca_file="/nowhere/ca.pem"))


def test_what_is_advertised() -> None:
    assert advertised("gpu-1.example:9000", "0.0.0.0", "mesh://127.0.0.1:1") == ("gpu-1.example", 9000)
    assert advertised("10.1.2.3", "0.0.0.0", "mesh://127.0.0.1:1") == ("10.1.2.3", 0)
    assert advertised(None, "10.1.2.3", "mesh://10.9.9.9:1") == ("10.1.2.3", 0)
    assert advertised(None, "0.0.0.0", "consul://127.0.0.1:8500") == ("127.0.0.1", 0)
    assert advertised(None, "127.0.0.1", "") == ("127.0.0.1", 0)
    assert split_address("[::1]:80") == ("::1", 80)


@pytest.mark.parametrize(
    ("advertise", "bind", "registry", "why"),
    [
        (None, "127.0.0.1", "consul://192.0.2.1:8500", "another host"),
        ("localhost:80", "0.0.0.0", "mesh://127.0.0.1:1,192.0.2.1:2", "another host"),
        ("0.0.0.0:80", "0.0.0.0", "mesh://127.0.0.1:1", "--advertise"),
        ("169.254.1.1:80", "0.0.0.0", "mesh://127.0.0.1:1", "link-local"),
        ("h:0", "0.0.0.0", "mesh://127.0.0.1:1", "1 .. 65535"),
    ],
)
def test_what_cannot_be_advertised(advertise: str | None, bind: str, registry: str, why: str) -> None:
    with pytest.raises(RegistryError, match=why):
        advertised(advertise, bind, registry)


def test_the_route_to_the_registry_gives_our_address() -> None:
    assert route_to("127.0.0.1", 1) == "127.0.0.1"
    assert route_to("no-such-host.invalid", 1) == ""
    outside = route_to("192.0.2.1", 9)  # TEST-NET: nothing is sent, the kernel only chooses a route
    if outside:
        assert socket.inet_aton(outside) and not outside.startswith("127.")
        assert advertised(None, "0.0.0.0", "consul://192.0.2.1:8500") == (outside, 0)
