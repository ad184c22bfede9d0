"""Passes: good for one address, for minutes, under one key."""

from __future__ import annotations

import time
from collections.abc import Callable

import jwt
import pytest

from infermesh.errors import MeshError, Reason
from services.chassis.keys import Key, Keys
from services.chassis.passes import LENT_S, LIFE_S, SKEW_S, Passes

HERE = "10.0.0.1:50051"


def instance(key: str = "root") -> Passes:
    passes = Passes(key)
    passes.address = HERE
    return passes


def token(made_by: Passes, address: str = HERE) -> str:
    scheme, _, value = made_by.show(address).partition(" ")
    assert scheme == "mesh"
    return value


def test_a_pass_opens_the_address_it_was_made_for_and_shows_nothing_of_the_key() -> None:
    mine = token(Passes("root"))
    checked = instance()
    checked.check(mine)
    checked.check(mine)  # known by now
    assert "root" not in mine and set(jwt.decode(mine, options={"verify_signature": False})) == {"aud", "iat", "exp"}


@pytest.mark.parametrize(
    ("show", "why"),
    [
        (lambda: token(Passes("root"), "10.0.0.66:50051"), "another address than 10.0.0.1:50051"),
        (lambda: token(Passes("guess")), "not made with the operator's key"),
        (lambda: token(Passes("root", lambda: time.time() - LIFE_S - SKEW_S - 1)), "clocks"),
        (lambda: token(Passes("root", lambda: time.time() + 3600)), "clocks"),
        (lambda: jwt.encode({"aud": HERE}, "", algorithm="none"), "not made with"),
        (lambda: "", "not made with"),
        (lambda: "root", "not made with"),
    ],
)
def test_any_other_is_refused_with_the_reason(show: Callable[[], str], why: str) -> None:
    with pytest.raises(MeshError, match=why) as caught:
        instance().check(show())
    assert caught.value.reason is Reason.UNAUTHENTICATED


def test_a_pass_is_shown_for_half_its_life() -> None:
    now = time.time()
    passes = Passes("root", lambda: now)
    first = passes.show(HERE)
    now += LIFE_S / 2 - 1
    assert passes.show(HERE) == first
    now += 2
    assert passes.show(HERE) != first


def test_one_that_was_checked_before_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    checked, late = instance(), time.time() - LIFE_S - SKEW_S / 2  # still good by the allowance for clocks
    mine = token(Passes("root", lambda: late))
    checked.check(mine)
    monkeypatch.setattr("services.chassis.passes.SKEW_S", 0.0)
    with pytest.raises(MeshError, match="clocks"):
        checked.check(mine)


def test_a_lent_pass_is_good_once_at_its_address_and_for_its_relay() -> None:
    gateway, here = Passes("root"), instance()
    scheme, _, lent = gateway.lend(HERE, b"attempt 7").partition(" ")
    assert scheme == "lease" and here.spend(lent) == b"attempt 7"
    with pytest.raises(MeshError, match="has been used"):
        here.spend(lent)
    head, claims, signature = lent.split(".")
    for spelt in (f"{head}.{claims}.{signature}=", f"{head}.{claims}.{signature}!", f"{head}.{claims}.{signature} "):
        with pytest.raises(MeshError):  # whatever the library makes of it
            here.spend(spelt)
    for other, why in (
        (gateway.lend("10.0.0.66:50051", b"1"), "another address"),
        (Passes("guess").lend(HERE, b"2"), "not made with"),
        (Passes("root", lambda: time.time() - LENT_S - SKEW_S - 1).lend(HERE, b"3"), "clocks"),
        (f"lease {token(gateway)}", "not made with"),
    ):
        with pytest.raises(MeshError, match=why):
            here.spend(other.partition(" ")[2])
    with pytest.raises(MeshError, match="not made with"):
        here.check(gateway.lend(HERE, b"4").partition(" ")[2])  # no gateway's pass, and no operator's


def test_spent_passes_are_remembered_no_longer_than_they_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.chassis.passes.MOST_KEPT", 8)
    here = instance()
    here._sweep_at = 8
    now = [time.time()]
    gateway = Passes("root", lambda: now[0])
    monkeypatch.setattr("services.chassis.passes.SKEW_S", 0.0)
    for number in range(8):
        here.spend(gateway.lend(HERE, b"%d" % number).partition(" ")[2])
    assert len(here._spent) == 8
    here._spent = dict.fromkeys(here._spent, now[0] - 1)
    here.spend(gateway.lend(HERE, b"9").partition(" ")[2])
    assert len(here._spent) == 1


def test_nobody_answers_before_it_knows_where() -> None:
    with pytest.raises(MeshError):
        Passes("root").check(token(Passes("root")))


def test_keys_take_a_pass_as_an_operators_and_only_where_it_can_be_checked() -> None:
    client = Key(sha256="a" * 64, tenant="t")
    keys = Keys((client,), instance())
    keys.operator(f"Mesh {token(Passes('root'))}")
    with pytest.raises(MeshError):
        keys.operator(f"Mesh {token(Passes('guess'))}")
    with pytest.raises(MeshError, match="operator-key-file"):
        Keys((client,)).operator(f"Mesh {token(Passes('root'))}")
