"""The embedded registry's state, the vanish guard and the merged view: pure, so time is a number here."""

from __future__ import annotations

from dataclasses import replace

from registry.consul_watch import KindView, Pace
from registry.consul_wire import Answer, assertion, next_index
from registry.directory import Directory, Limits, Line, Listed
from registry.embedded_watch import HostView, MergedView
from registry.endpoint import Endpoint, to_metadata
from registry.guard import Seniority, VanishGuard
from registry.port import Entry


def line(id: str = "a", incarnation: int = 1, **more: str) -> Line:
    return Line("infermesh-llm", id, "127.0.0.1", 80, {"incarnation": f"{incarnation:x}", **more})


def names(directory: Directory) -> dict[str, bool]:
    """id -> suspect"""
    return {item.line.id: item.suspect for item in directory.listed()}


def test_goodbye_is_at_once_and_a_broken_stream_is_suspect_for_three_seconds() -> None:
    directory = Directory(0.0)
    directory.join(1, line("a"), 0.0)
    directory.join(2, line("b"), 0.0)
    directory.leave(1)
    assert names(directory) == {"b": False}
    directory.lose(2, 1.0)
    assert names(directory) == {"b": True}
    for now in (0.9, 1.8, 2.7, 3.6, 3.99):
        directory.tick(now)
    assert names(directory) == {"b": True}
    directory.tick(4.01)
    assert names(directory) == {}


def test_the_same_life_may_come_back_on_another_stream() -> None:
    directory = Directory(0.0)
    directory.join(1, line(), 0.0)
    joined = directory.join(2, line(), 0.5)  # the first stream is half open, nobody has noticed
    assert joined.refused == "" and joined.superseded is None
    directory.lose(1, 0.6)
    assert names(directory) == {"a": False}, "the old stream's end is no news"


def test_the_later_life_wins_for_good() -> None:
    directory = Directory(0.0)
    directory.join(1, line(incarnation=7), 0.0)
    assert directory.join(2, line(incarnation=3), 1.0).superseded == 1
    assert "superseded" in directory.join(3, line(incarnation=7), 2.0).refused
    directory.lose(1, 2.0)
    assert [item.line.incarnation for item in directory.listed()] == [3]
    directory.lose(2, 2.0)
    assert "superseded" in directory.join(4, line(incarnation=7), 3.0).refused, "also while the later is suspect"


def test_silence_makes_suspect_and_a_word_mends_it() -> None:
    directory = Directory(0.0)
    directory.join(1, line(), 0.0)
    for now in (0.5, 1.0, 1.5, 2.0, 2.4):
        directory.tick(now)
    assert names(directory) == {"a": False}
    directory.tick(2.6)
    assert names(directory) == {"a": True}
    directory.renew(1, 3.0)
    assert names(directory) == {"a": False}
    for step in range(4, 16):
        directory.tick(step * 0.75)
    assert names(directory) == {}
    directory.renew(1, 12.5)
    assert names(directory) == {"a": False}, "the stream was never broken: it is back at its first word"


def test_our_own_sleep_is_nobodys_silence() -> None:
    directory = Directory(0.0)
    directory.join(1, line(), 0.0)
    directory.tick(0.25)
    directory.tick(60.0)
    assert names(directory) == {"a": False}


def test_the_revision_rises_only_when_a_watcher_would_see_it() -> None:
    directory = Directory(0.0)
    directory.join(1, line(), 0.0)
    first = directory.revision
    directory.renew(1, 1.0)
    directory.join(1, line(), 1.0)
    directory.tick(1.1)
    assert directory.revision == first
    directory.join(1, line(weight="2"), 1.2)
    assert directory.revision == first + 1


def test_bounds() -> None:
    directory = Directory(0.0, Limits(entries=2, total_bytes=2000))
    assert "1 to 128" in directory.join(1, line("x" * 129), 0.0).refused
    assert "1 to 128" in directory.join(1, line("a b"), 0.0).refused
    assert "pairs" in directory.join(1, replace(line(), metadata={f"k{n}": "" for n in range(65)}), 0.0).refused
    assert "513 bytes" in directory.join(1, line(zone="x" * 513), 0.0).refused
    assert "key" in directory.join(1, replace(line(), metadata={"a.b": ""}), 0.0).refused
    assert directory.join(1, line("a", zone="x" * 512), 0.0).refused == ""
    assert "one stream" in directory.join(1, line("b"), 0.0).refused
    big = replace(line("b"), metadata={f"k{n}": "x" * 500 for n in range(4)})
    assert "bytes" in directory.join(2, big, 0.0).refused
    assert directory.join(2, line("b"), 0.0).refused == ""
    assert "full" in directory.join(3, line("c"), 0.0).refused
    directory.leave(1)
    assert directory.join(3, big, 0.0).refused != "" and directory.join(3, line("c"), 0.0).refused == ""


def entry(id: str, *, passing: bool = True, incarnation: int = 1) -> Entry:
    return Entry(Endpoint(id, "llm", "127.0.0.1", 80, "m", incarnation=incarnation), passing)


def some(*ids: str) -> dict[str, Entry]:
    return {id: entry(id) for id in ids}


def test_half_may_vanish_at_once_and_no_more_within_the_grace_time() -> None:
    guard = VanishGuard(grace_s=10)
    assert guard.update(some(*"abcdef"), 0.0).keys() == set("abcdef")
    assert guard.update(some(*"abcd"), 1.0).keys() == set("abcd")
    assert guard.update(some(*"abc"), 2.0).keys() == set("abc")
    assert guard.update(some(*"ab"), 3.0).keys() == set("abc"), "a slow drain to nothing is a vanishing, too"
    assert guard.holding
    assert guard.update(some(*"ab"), 12.9).keys() == set("abc")
    assert guard.update(some(*"ab"), 13.0).keys() == set("ab")
    assert not guard.holding


def test_what_vanishes_in_mass_is_kept_until_it_is_back_or_the_grace_time_is_over() -> None:
    guard = VanishGuard(grace_s=10)
    guard.update(some(*"abcd"), 0.0)
    assert guard.update({}, 1.0).keys() == set("abcd")
    assert guard.update(some("a", "b"), 2.0).keys() == set("abcd"), "half is back; the others get their time"
    assert guard.update(some("a", "b", "c"), 5.0).keys() == set("abcd")
    assert guard.update(some("a", "b", "c"), 11.0).keys() == set("abc")


def test_the_registrys_absence_is_not_its_word() -> None:
    guard = VanishGuard(grace_s=10)
    guard.update(some(*"abc"), 0.0)
    guard.update({}, 1.0)
    guard.pause()
    assert guard.update({}, 600.0).keys() == set("abc")
    assert guard.update({}, 610.0) == {}


def test_a_second_witness_is_believed_and_a_rebirth_is_not() -> None:
    guard = VanishGuard(grace_s=10)
    guard.update(some("a", "b"), 0.0)
    assert guard.update({}, 1.0, sure={"a", "b"}) == {}
    guard.update(some(*"abcd"), 20.0)
    assert guard.update(some(*"abc"), 21.0, reborn=True).keys() == set("abcd")


def test_seniority_is_the_order_of_meeting() -> None:
    seniority = Seniority(limit=2)
    assert seniority.rank("a", 9) < seniority.rank("a", 1)
    assert seniority.rank("a", 9) == seniority.rank("a", 9)
    seniority.rank("b", 1)  # forgets the longest unmet
    assert seniority.rank("a", 9) < seniority.rank("b", 1)


def listed(*entries: Entry) -> list[Listed]:
    return [
        Listed(
            Line("infermesh-llm", e.endpoint.id, e.endpoint.host, e.endpoint.port, to_metadata(e.endpoint)),
            not e.passing,
        )
        for e in entries
    ]


def test_several_registries_are_one_directory() -> None:
    merged = MergedView(grace_s=10)
    left, right = HostView("127.0.0.1", "infermesh"), HostView("127.0.0.1", "infermesh")
    merged.views = [left, right]
    assert not merged.known
    merged.heard(left, listed(entry("a"), entry("b", passing=False)), 60, 100.0)
    merged.heard(right, listed(entry("b"), entry("c")), 60, 100.0)
    snapshot = merged.snapshot(100.0)
    assert [(e.endpoint.id, e.passing) for e in snapshot.entries] == [("a", True), ("b", True), ("c", True)]
    assert not snapshot.stale and not snapshot.young
    merged.lost(left)
    assert [e.endpoint.id for e in merged.snapshot(101.0).entries] == ["a", "b", "c"], "only the lost one listed a"
    assert [e.endpoint.id for e in merged.snapshot(111.0).entries] == ["b", "c"]
    merged.lost(right)
    assert merged.snapshot(112.0).stale and len(merged.snapshot(500.0).entries) == 2


def test_of_two_lives_the_one_met_later_counts() -> None:
    merged = MergedView(grace_s=10)
    left, right = HostView("127.0.0.1", "infermesh"), HostView("127.0.0.1", "infermesh")
    merged.views = [left, right]
    merged.heard(left, listed(entry("a", incarnation=9)), 60, 0.0)
    merged.heard(right, listed(entry("a", incarnation=9)), 60, 0.0)
    merged.snapshot(0.0)
    merged.heard(right, listed(entry("a", incarnation=2)), 60, 1.0)
    assert merged.snapshot(1.0).entries[0].endpoint.incarnation == 2


def test_goodbye_is_told_from_a_loss() -> None:
    merged = MergedView(grace_s=10)
    view = HostView("127.0.0.1", "infermesh")
    merged.views = [view]
    merged.heard(view, listed(entry("a"), entry("b")), 60, 0.0)
    merged.snapshot(0.0)
    merged.heard(view, listed(), 60, 1.0)
    assert merged.snapshot(1.0).entries == (), "both said goodbye"
    merged.heard(view, listed(entry("a", passing=False), entry("b", passing=False)), 60, 2.0)
    merged.snapshot(2.0)
    merged.heard(view, listed(), 60, 5.0)
    assert len(merged.snapshot(5.0).entries) == 2, "both streams broke: perhaps it is the registry that is cut off"
    merged.lost(view)
    merged.heard(view, listed(), 0, 20.0)
    assert merged.snapshot(20.0).young


def test_loopback_of_another_host_is_rejected() -> None:
    view = HostView("10.0.0.1", "infermesh")
    view.heard(listed(entry("a")), 0.0)
    assert "loopback" in view.rejected["a"].reason


def test_an_index_that_goes_backwards_begins_anew() -> None:
    assert next_index(10, "11") == 11
    assert next_index(10, "10") == 10
    assert next_index(59, "10") == 0
    assert [next_index(5, bad) for bad in ("0", "-1", "x", "")] == [0, 0, 0, 0]


def node(id: str, *, passing: bool = True, created: int = 1, incarnation: int = 1) -> dict[str, object]:
    endpoint = entry(id, incarnation=incarnation).endpoint
    meta = to_metadata(endpoint)
    service = {"ID": id, "Address": "127.0.0.1", "Port": 80, "Meta": meta, "CreateIndex": created}
    return {
        "Node": {"Address": "127.0.0.1"},
        "Service": service,
        "Checks": [{"Status": "passing" if passing else "critical"}],
    }


def test_consuls_listing_index_backwards_keeps_the_set() -> None:
    view = KindView("llm", "127.0.0.1", 10)
    view.heard(Answer([node("a"), node("b")], "59", True, False), 0.0)
    view.heard(Answer([], "10", True, False), 1.0)
    assert len(view.entries) == 2 and view.young and view.index == 0
    view.heard(Answer([node("a"), node("b")], "12", True, False), 2.0)
    assert len(view.entries) == 2 and not view.young and view.index == 12


def test_one_broken_query_is_enough_to_doubt_what_a_consul_that_is_filling_does_not_list() -> None:
    view = KindView("llm", "127.0.0.1", 10)
    view.heard(Answer([node("a"), node("b")], "59", True, False), 0.0)
    view.broken()
    assert not view.heard(Answer([node("a")], "12", True, False), 1.0) and not view.stale
    assert len(view.entries) == 2 and view.young
    view.heard(Answer([node("a")], "13", True, False), 11.5)
    assert len(view.entries) == 1 and not view.young


def test_consuls_listing_without_a_leader_is_stale_and_drops_nothing() -> None:
    view = KindView("llm", "127.0.0.1", 10)
    view.heard(Answer([node("a"), node("b")], "5", True, False), 0.0)
    for now in (1.0, 100.0, 200.0):
        view.heard(Answer([node("b")], "5", False, False), now)
        assert len(view.entries) == 2 and view.stale


def test_of_one_id_on_two_agents_the_passing_then_the_later_counts() -> None:
    view = KindView("llm", "127.0.0.1", 10)
    view.heard(Answer([node("a", created=9, incarnation=9), node("a", created=3, incarnation=3)], "5", True, False), 0)
    assert view.entries[0].endpoint.incarnation == 9
    items = [node("a", created=9, incarnation=9, passing=False), node("a", created=3, incarnation=3)]
    view.heard(Answer(items, "6", True, False), 0)
    assert view.entries[0].endpoint.incarnation == 3


def test_what_is_not_an_entry_at_all_is_rejected() -> None:
    view = KindView("llm", "127.0.0.1", 10)
    junk = [None, 1, "x", [], {}, {"Service": None}, {"Service": {"ID": "a", "Port": "x", "Address": "h"}}, node("a")]
    view.heard(Answer(junk, "5", True, False), 0.0)
    assert len(view.entries) == 1 and len(view.rejected) == 7


def test_the_pace_bounds_the_rate() -> None:
    pace, now, asked = Pace(rate=4, burst=4), 1000.0, 0
    while now < 1010.0:
        now += pace.delay(now) + 0.001
        asked += 1
    assert 40 <= asked <= 46


def test_what_the_agent_holds_decides_what_to_do() -> None:
    mine = entry("a").endpoint
    held = {"ID": "a", "Address": mine.host, "Port": mine.port, "Meta": to_metadata(mine)}
    assert assertion(None, mine) == "register"
    assert assertion(held, mine) == ""
    assert assertion({**held, "Port": 81}, mine) == "register"
    assert assertion(held, replace(mine, weight=2.0)) == "register"
    assert assertion(held, replace(mine, incarnation=2)) == "superseded"
