"""The standing of an instance as a table, and its rules: how long it stays out, what counts, how many may be out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infermesh.errors import Reason
from services.gateway.routing import panic
from services.gateway.routing.ejections import FORGIVE_S, Ejections, ramp
from services.gateway.routing.facts import End, Member
from services.gateway.routing.health import TABLE, Cause, Link, Signal, Standing, State, Voices
from services.gateway.routing.router import Router
from services.gateway.routing.tally import Tally
from tests.kit.routing import endpoint, pick, router
from tests.kit.virtual import Virtual, virtual

S, G = Standing, Signal


@pytest.mark.parametrize("standing", Standing)
@pytest.mark.parametrize("signal", Signal)
def test_every_signal_in_every_standing(standing: Standing, signal: Signal) -> None:
    voices = Voices(link=Link.UP, standing=standing, cause=Cause.SILENT, why="because")
    changed = voices.signal(signal)
    assert voices.standing is TABLE.get((standing, signal), standing) and changed is ((standing, signal) in TABLE)
    assert (voices.why == "") is (voices.standing is S.SOUND and changed) or not changed


@pytest.mark.parametrize(
    ("path", "ends"),
    [
        ([G.DOUBT, G.CLEARED], S.SOUND),
        ([G.DOUBT, G.CONVICTED, G.CLEARED], S.SOUND),
        ([G.CONVICTED, G.ADMITTED, G.PROVEN], S.SOUND),
        ([G.CONVICTED, G.ADMITTED, G.DOUBT], S.OUT),
        ([G.CONVICTED, G.DOUBT, G.PROVEN, G.CONVICTED], S.OUT),
        ([G.CLEARED, G.ADMITTED, G.PROVEN], S.SOUND),
    ],
)
def test_paths(path: list[Signal], ends: Standing) -> None:
    voices = Voices(link=Link.UP)
    for signal in path:
        voices.signal(signal)
    assert voices.standing is ends


@pytest.mark.parametrize(
    ("given", "state"),
    [
        ({}, State.HEALTHY),
        ({"registered": False}, State.SUSPECT),
        ({"passing": False}, State.SUSPECT),
        ({"standing": S.DOUBTED}, State.SUSPECT),
        ({"standing": S.OUT}, State.EJECTED),
        ({"standing": S.TRIAL}, State.PROBATION),
        ({"standing": S.TRIAL, "passing": False}, State.PROBATION),
        ({"link": Link.NEW}, State.STARTING),
        ({"link": Link.NEW, "standing": S.OUT}, State.EJECTED),
        ({"link": Link.DOWN, "standing": S.OUT}, State.LOST),
        ({"draining": True, "link": Link.DOWN}, State.DRAINING),
        ({"banned": "by ops", "draining": True}, State.BANNED),
    ],
)
def test_facts_overrule_what_we_think(given: dict[str, object], state: State) -> None:
    assert Voices(**{"link": Link.UP, **given}).state() is state  # type: ignore[arg-type]


def test_time_out_doubles_from_5_to_60_seconds_give_or_take_a_fifth_and_good_conduct_is_forgiven() -> None:
    ejections, now = Ejections("gw-1"), 100.0
    for wanted in (5, 10, 20, 40, 60, 60):
        term = ejections.strike("a", now) - now
        assert 0.8 * wanted <= term <= 1.2 * wanted
        now += term
    assert ejections.until("b") == 0 and ejections.strike("b", now, free=True) == now
    assert ejections.strike("b", now, free=True) > now, "the second death in a row costs time"
    for _ in range(6):
        now += FORGIVE_S + 1
        ejections.forgive(now)
    assert ejections.strikes == {}
    assert Ejections("gw-1").strike("a", 0) == Ejections("gw-1").strike("a", 0) != Ejections("gw-2").strike("a", 0)


def test_slow_start_is_envoys() -> None:
    assert [ramp(t) for t in (0, 3, 15, 30, 99)] == [0.1, 0.1, 0.5, 1.0, 1.0]


def test_calls_that_one_fault_brought_down_count_once_in_a_row() -> None:
    tally = Tally()
    for _ in range(64):
        tally.failed(sent_at=10.0, now=12.0)
    assert tally.in_a_row == 1 and tally.too_many(12.0, (0, 0)) == ""
    tally.failed(12.5, 13.0)
    tally.failed(13.5, 14.0)
    assert "3 failures in a row" in tally.too_many(14.0, (0, 0))


@pytest.mark.parametrize(
    ("failures", "others", "out"),
    [(9, (0, 100), True), (3, (0, 100), False), (9, (30, 100), False), (9, (0, 0), True)],
)
def test_a_share_of_failures_is_too_many_unless_all_suffer(failures: int, others: tuple[int, int], out: bool) -> None:
    tally = Tally()
    for i in range(30):
        now = 50 + i * 0.3
        if i % 30 < failures * 2 and i % 2:
            tally.failed(now, now)
        else:
            tally.succeeded(now)
    assert bool(tally.too_many(59.0, others)) is out
    assert tally.window(75.0) == (0, 0)


@pytest.mark.parametrize(
    ("states", "spares"),
    [
        (["healthy"], []),
        (["suspect"], ["0"]),
        (["ejected"], ["0"]),
        (["lost"], []),
        (["healthy", "ejected"], []),
        (["suspect", "ejected"], ["0"]),
        (["ejected", "ejected"], ["0"]),
        (["healthy", "lost", "ejected"], ["2"]),
        (["healthy", "ejected", "suspect"], ["2"]),
        (["healthy", "ejected", "probation", "suspect", "lost"], ["2", "3"]),
        (["ejected", "draining", "banned"], ["0"]),
    ],
)
def test_panic_calls_back_the_least_bad_until_half_serve(states: list[str], spares: list[str]) -> None:
    r = router(*(endpoint(str(i)) for i in range(len(states))))
    pool = r.fleet.pools["llm", "m"]
    for instance, state in zip(pool, states, strict=True):
        instance.state = State(state)
    assert sorted(instance.id for instance in panic.spares(pool)) == spares


def test_a_newcomer_among_settled_ones_starts_slowly_and_new_fleets_start_at_once() -> None:
    r = router(endpoint("a"), endpoint("b"))
    r.update([Member(endpoint("a")), Member(endpoint("b")), Member(endpoint("c"))], 100.0)
    r.linked("c", 1, 100.0)
    assert [r.fleet.instances[id].share for id in "abc"] == [1.0, 1.0, 0.1]
    assert [pick(r).lease.instance_id for _ in range(4)].count("c") == 0


def test_a_crash_loop_stays_out_longer_each_time_over_all_its_lives() -> None:
    r = router(endpoint("a"), endpoint("b"))
    now, healthy = 100.0, 0
    for life in range(2, 40):  # it dies and comes back every two seconds
        r.unlinked("a", life - 1, "reset", now)
        r.update([Member(endpoint("a", incarnation=life)), Member(endpoint("b"))], now + 0.5)
        r.linked("a", life, now + 0.6)
        for step in range(28):
            r.tick(now + 0.6 + 0.05 * step)
            if step % 10 == 0:
                r.probed("a", life, True, now + 0.6 + 0.05 * step)
        healthy += r.fleet.instances["a"].state is State.HEALTHY
        now += 2.0
    assert healthy <= 5, "38 lives"
    assert r._desk.ejections.count("a") > 5


FAULTS = ("working", "talking", "failing")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(FAULTS), st.booleans(), st.integers(1, 60)), max_size=12),
)
def test_never_more_than_half_are_out_on_suspicion_and_somebody_always_serves(
    size: int, script: list[tuple[int, str, bool, int]]
) -> None:
    """Nobody dies here: all connections stand. Any faults, in any order, and the same again gives the same."""

    def play() -> Virtual:
        mesh = virtual(*(str(i) for i in range(size)))
        for who, fault, value, ticks in script:
            setattr(mesh.instances[str(who % size)], fault, value)
            for _ in range(ticks):
                lease = mesh.pick()
                if lease is not None:
                    mesh.begin(lease)
                mesh.run(0.05)
                out = [state for state in mesh.states().values() if state == "ejected"]
                assert len(out) <= size // 2
                pool = mesh.router.fleet.pools["llm", "m"]
                assert sum(i.state is State.HEALTHY or i.spare for i in pool) * 2 >= size
        return mesh

    mesh = play()
    assert play().log == mesh.log
    for lease in list(mesh.leases.values()):
        mesh.end(lease, End.FAILED, Reason.ENGINE_FAILED)
    assert all(not instance.ledger.entries for instance in mesh.router.fleet.instances.values())


def test_one_that_froze_and_is_the_same_life_comes_back_at_once() -> None:
    """The registry had given it up meanwhile; only another life would prove that it died."""
    r = router(endpoint("a"), endpoint("b"))
    for now in (100.0, 120.0, 140.0):
        r.unlinked("a", 1, "ping timeout", now)
        r.update([Member(endpoint("b"))], now + 1)
        assert "a" not in r.fleet.instances
        r.update([Member(endpoint("a")), Member(endpoint("b"))], now + 4)
        r.linked("a", 1, now + 4)
        assert r.fleet.instances["a"].state is State.HEALTHY
    assert not r._desk.ejections.strikes


def test_who_is_still_being_reached_has_been_since_it_came() -> None:
    r = Router(0.0)
    r.update([Member(endpoint("a"))], 500.0)
    a = r.fleet.instances["a"]
    assert (a.state, a.since) == (State.STARTING, 500.0)
    r.linked("a", 1, 502.0)
    assert (a.state, a.since) == (State.HEALTHY, 502.0)
