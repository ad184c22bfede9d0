"""Bans: merged in any order, carried as metadata, and what they do to an instance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infermesh.cli.ban import seconds
from infermesh.errors import MeshError
from registry.endpoint import Endpoint, from_metadata, to_metadata
from registry.port import Entry, Snapshot
from services.gateway.observe import Observe
from services.gateway.routing.bans import KEEP_LIFTED_S, MOST, Ban, Bans, decode, encode, plain
from services.gateway.routing.bans import from_metadata as bans_of
from services.gateway.routing.decision import Eject
from services.gateway.routing.facts import Member
from services.gateway.upstream.bans import BanBoard
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.channels import Channels
from tests.kit.routing import DONE, OLD, endpoint, pick, router

BANS = st.builds(
    Ban,
    at=st.sampled_from([1.0, 2.0, 3.0]),
    id=st.sampled_from("abc"),
    by=st.text(max_size=200),
    why=st.text(max_size=300),
    until=st.sampled_from([0.0, 5.0]),
    lifted=st.booleans(),
)


@given(st.lists(BANS, max_size=8), st.randoms(use_true_random=False))
def test_gateways_agree_in_whichever_order_they_hear(words: list[Ban], random: object) -> None:
    one, other = Bans(), Bans()
    one.merge(words, 4.0)
    random.shuffle(words)  # type: ignore[attr-defined]
    for word in words:
        other.merge([word], 4.0)
    assert one.known == other.known and not one.merge(other.known.values(), 4.0)


@given(BANS)
def test_a_ban_fits_a_value_of_metadata(ban: Ban) -> None:
    text = encode(ban)
    told = decode(text)
    assert len(text.encode()) <= 512 and text.isprintable() and told is not None
    assert (told.id, told.at, told.until, told.lifted) == (ban.id, ban.at, ban.until, ban.lifted)
    assert plain(ban.why).startswith(told.why) and plain(ban.by).startswith(told.by)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", "{}", '{"at": "x", "id": "a"}', '{"at": 1, "id": ""}', '{"x": 1}'),
        *('{"at": 1, "id": "no blanks"}', '{"at": Infinity, "id": "a"}', '{"at": NaN, "id": "a"}'),
    ],
)
def test_what_is_no_ban_is_ignored(text: str) -> None:
    assert decode(text) is None


def test_a_ban_ends_by_itself_is_lifted_and_is_forgotten() -> None:
    bans = Bans()
    bans.put(Ban(10.0, "a", "ops", "hot", until=70.0))
    assert bans.holding(69.0) == {"a": "banned by ops: hot"} and bans.holding(70.0) == {}
    bans.put(Ban(9.0, "a", "ops", lifted=True))  # from a gateway whose clock is behind
    assert bans.holding(20.0) == {}
    bans.merge([], 11.0 + KEEP_LIFTED_S)
    assert bans.known == {}


def test_there_are_not_too_many() -> None:
    bans = Bans()
    for number in range(MOST):
        bans.put(Ban(1.0, str(number)))
    with pytest.raises(MeshError, match="unban some"):
        bans.put(Ban(2.0, "one more"))
    bans.put(Ban(2.0, "3", lifted=True))
    bans.put(Ban(3.0, "one more"))
    assert len(bans.known) == MOST and "3" not in bans.known


def test_a_gateway_that_remembers_many_lifted_bans_hears_of_a_new_one() -> None:
    here, there = Bans(), Bans()
    for number in range(MOST):
        here.put(Ban(1.0 + number, f"i{number}", lifted=True))
    there.merge(here.known.values(), 50.0)
    here.put(Ban(60.0, "new"))
    for _ in range(2):
        there.merge(here.known.values(), 61.0)
        here.merge(there.known.values(), 61.0)
    assert there.holding(61.0) == {"new": "banned"} and there.known == here.known and len(here.known) == MOST
    assert not there.merge([Ban(1.0, "i0", lifted=True)], 61.0), "what was let go is no news"


def test_of_too_many_that_hold_the_oldest_do_wherever_they_were_put() -> None:
    words = [Ban(float(number), f"i{number}") for number in range(MOST + 3)]
    one, other = Bans(), Bans()
    one.merge(words, 99.0)
    for word in reversed(words):
        other.merge([word], 99.0)
    assert one.known == other.known == {ban.id: ban for ban in words[:MOST]}


def test_metadata_carries_them_through_a_registration() -> None:
    bans = Bans()
    bans.put(Ban(1.5, "a", "ops", "überhitzt"))
    gateway = Endpoint("gw", "gateway", "10.0.0.1", 50050, "", 1, extra={"http": "10.0.0.1:80", **bans.metadata()})
    told = from_metadata("gw", "gateway", "10.0.0.1", 50050, to_metadata(gateway))
    assert isinstance(told, Endpoint) and bans_of(told.extra) == list(bans.known.values())


def test_a_banned_instance_finishes_what_it_has_and_gets_nothing_also_in_its_next_life() -> None:
    r = router(endpoint("a"), endpoint("b"))
    lease = pick(r).lease
    assert lease.instance_id == "a"
    assert r.ban({"a": "banned by ops"}, OLD) == [Eject("a", "banned by ops")]
    assert {pick(r).lease.instance_id for _ in range(2)} == {"b"}
    r.release(lease, DONE, OLD)
    r.update([Member(endpoint("a", incarnation=2)), Member(endpoint("b"))], OLD)
    r.linked("a", 2, OLD)
    a = r.fleet.instances["a"]
    assert (a.state.value, a.why()) == ("banned", "banned by ops")
    r.ban({}, OLD + 1)
    assert a.state.value == "healthy"


async def test_the_board_hears_of_others_keeps_a_file_and_tells(tmp_path: Path) -> None:
    file, told = tmp_path / "deep" / "bans.json", []

    def board() -> BanBoard:
        return BanBoard(Carrier(router(endpoint("a")), Channels(), Observe(), lambda: OLD), file, lambda: 100.0)

    async def publish(metadata: dict[str, str]) -> None:
        told.append(metadata)

    first = board()
    await first.tell(publish, {})
    assert not told
    await first.put("a", "ops", "hot", 60)
    other = Endpoint("gw-2", "gateway", "h", 1, "", 1, extra={"ban_0": encode(Ban(99.0, "b", "eve"))})
    await first.hear(Snapshot((Entry(other),)))
    await first.hear(Snapshot((Entry(other),)))
    assert first.holding == {"a": "banned by ops: hot", "b": "banned by eve"} and len(told) == 2
    assert first._carrier.router.fleet.instances["a"].state.value == "banned"
    assert board().holding == first.holding, "over a restart"
    file.write_text("{")
    with pytest.raises(ValueError, match="bans_file"):
        board()
    assert json.loads(told[0]["ban_0"])["why"] == "hot"


async def test_what_a_gateway_hears_while_it_registers_it_tells_on() -> None:
    """Else a ban would not outlive a fleet of gateways that are replaced one after the other."""
    board = BanBoard(Carrier(router(endpoint("a")), Channels(), Observe(), lambda: OLD), None, lambda: 100.0)
    registered, told = board.metadata, []
    other = Endpoint("gw-2", "gateway", "h", 1, "", 1, extra={"ban_0": encode(Ban(99.0, "a", "eve"))})
    await board.hear(Snapshot((Entry(other),)))

    async def publish(metadata: dict[str, str]) -> None:
        told.append(metadata)

    await board.tell(publish, registered)
    assert told == [board.metadata] and bans_of(told[0]) == [Ban(99.0, "a", "eve")]


@pytest.mark.parametrize(("text", "found"), [("", None), ("90", 90), ("30s", 30), ("10m", 600), ("1.5h", 5400)])
def test_times(text: str, found: float | None) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize("text", ["0", "soon", "10 m", "-1m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a time"):
        seconds(text)
