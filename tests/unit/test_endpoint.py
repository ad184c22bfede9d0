"""Endpoint values <-> metadata, and the addresses that registries and advertisements may hold."""

from __future__ import annotations

import socket
from dataclasses import replace
from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.address import open_registry, parse_url, split_address
from registry.advertise import advertised, route_to
from registry.consul import ConsulRegistry, Tls
from registry.embedded import MeshRegistry
from registry.endpoint import (
    CONTRACT,
    KINDS,
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
from services.gateway.routing.decision import Refuse, Wait
from services.gateway.routing.facts import Facts, Member
from services.gateway.routing.router import Router

PLAIN = Endpoint("a", "llm", "10.0.0.1", 80, "m")
words = st.text(st.characters(categories=("L", "N", "P"), exclude_characters=","), max_size=40)
rates = st.none() | st.floats(1, 60_000)


@given(
    incarnation=st.integers(0, 2**64 - 1),
    model=words.filter(bool),
    aliases=st.lists(words.filter(bool), max_size=3).map(tuple),
    zone=words,
    speed=st.builds(Speed, rates, rates, rates, rates, rates, rates, st.sampled_from(["prior", "observed"])),
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


NUMBERS = (
    *("prefill_tps", "prefill_doubling_ctx", "step_ms", "kv_us_per_ktoken", "fixed_ms", "tokens_per_s", "weight"),
    *("context_min", "context_max", "max_running", "kv_tokens", "kv_block", "tp", "pp", "device_count", "memory_mib"),
)
odd_numbers = (
    st.sampled_from(["nan", "-nan", "inf", "-inf", "1e999", "-1", "-0.0", "0", "1e-300", "1e300", "1_000", "0x10"])
    | st.sampled_from(["\u0661\u0662", "\uff11", " 7", "7 ", "+7", "", "1e8", "9" * 400, "None", "1,5", "1;DROP"])
    | st.floats().map(repr)
    | st.integers().map(str)
    | st.text(max_size=20)
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(NUMBERS), odd_numbers, min_size=1, max_size=5), st.sampled_from(KINDS[:3]))
def test_absurd_numbers_are_rejected_by_name_and_the_rest_keeps_serving(odd: dict[str, str], kind: str) -> None:
    """Whatever an instance claims: it is refused with the key's name, or every number that follows is finite."""
    read = from_metadata("odd", kind, "10.0.0.2", 80, {"contract": CONTRACT, "model": "m", **odd})
    members = [Member(replace(PLAIN, kind=kind))]
    if isinstance(read, Rejected):
        assert any(f"metadata {key}:" in read.reason for key in odd), read.reason
    else:
        members.append(Member(read))
    router = Router(0.0)
    router.update(members, 0.0)
    for member in members:
        router.linked(member.endpoint.id, member.endpoint.incarnation, 0.0)
    for i in range(3):
        decision = router.pick(Facts(kind, "m", prompt_tokens=500, max_tokens=20, since=100.0), 100.0 + i)
        assert not isinstance(decision, Refuse)
        record = decision.record if isinstance(decision, Wait) else decision.lease.record
        assert "a" in {candidate.id for candidate in record.candidates}
        for candidate in record.candidates:
            assert all(isfinite(seconds) and seconds >= 0 for seconds in (candidate.cost_s, *candidate.seconds))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"weight": "nan"}, "metadata weight: nan is not within 0.001 .. 1000"),
        ({"weight": "-2"}, "metadata weight: -2 is not within 0.001 .. 1000"),
        ({"prefill_tps": "-4300"}, "metadata prefill_tps: -4300 is not within 0.01 .. 1e+08"),
        ({"prefill_tps": "4_300"}, "metadata prefill_tps: '4_300' is not a plain number"),
        ({"step_ms": "27000000"}, "metadata step_ms: 27000000 is not within 1e-06 .. 60000"),
        ({"context_min": "9", "context_max": "8"}, "metadata context_min: 9 is not below context_max 8"),
        ({f"k{n}": "" for n in range(80)}, "82 metadata keys, at most 64 are read"),
    ],
)
def test_the_reason_names_the_key_and_what_is_allowed(metadata: dict[str, str], reason: str) -> None:
    read = from_metadata("a", "llm", "10.0.0.1", 80, {"contract": CONTRACT, "model": "m", **metadata})
    assert isinstance(read, Rejected) and read.reason == reason


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
