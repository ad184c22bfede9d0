"""What every registry must do. One suite, two implementations: a real Consul server, and the embedded registry."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from registry.address import open_registry
from registry.endpoint import CONTRACT, Capacity, Endpoint, Hardware, Speed
from registry.port import Registry, RegistryError
from tests.kit.debian import NoProgram, not_here
from tests.kit.registered_instance import health_server
from tests.kit.registries import LEAVING_S, Backend, ConsulBackend, EmbeddedBackend, Watching, first_seen, ids, instance

GOOD = {"contract": CONTRACT, "model": "m"}


@pytest.fixture(params=[pytest.param("consul", marks=pytest.mark.consul), "embedded"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    made: Any
    try:
        made = await asyncio.to_thread(ConsulBackend) if request.param == "consul" else EmbeddedBackend()
    except NoProgram as error:
        not_here(error)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def connect(backend: Backend) -> AsyncIterator[Callable[[], Registry]]:
    """Makes clients, as many as processes would."""
    made: list[Registry] = []

    def open_one() -> Registry:
        made.append(open_registry(backend.url))
        return made[-1]

    yield open_one
    for registry in made:
        await registry.close()


@pytest.fixture
async def watching(connect: Callable[[], Registry]) -> AsyncIterator[Watching]:
    started = Watching(connect())
    yield started
    await started.close()


@pytest.fixture
async def served() -> AsyncIterator[int]:
    """The port of something whose health is good."""
    server, port = health_server()
    await server.start()
    yield port
    await server.stop(0)


def endpoint(id: str, port: int, **changes: Any) -> Endpoint:
    made = Endpoint(id, "llm", "127.0.0.1", port, "m", incarnation=secrets.randbits(64), engine="scripted")
    return replace(made, **changes)


async def test_register_watch_leave(connect: Callable[[], Registry], watching: Watching, served: int) -> None:
    await watching.until(lambda s: not s.stale and not s.entries)
    mine = connect()
    await mine.register(endpoint("a", served))
    await watching.until(lambda s: ids(s) == {"a"})
    assert ids(first_seen(watching, "a")) == {"a"}, "usable from the first moment on"
    await mine.deregister("a")
    await watching.until(lambda s: not s.entries, LEAVING_S)


async def test_one_alone_that_leaves_is_not_taken_for_a_loss(
    connect: Callable[[], Registry], watching: Watching, served: int
) -> None:
    mine = connect()
    await mine.register(endpoint("a", served))
    await mine.register(endpoint("b", served))
    await watching.until(lambda s: ids(s) == {"a", "b"})
    await asyncio.gather(mine.deregister("a"), mine.deregister("b"))
    await watching.until(lambda s: not s.entries, LEAVING_S)


async def test_metadata_survives_the_journey(connect: Callable[[], Registry], watching: Watching, served: int) -> None:
    sent = endpoint(
        "a",
        served,
        aliases=("m-1", "größe"),
        dtype="fp16",
        hardware=Hardware("A800-80G", 4, 81_000, 4, 1),
        speed=Speed(4300.5, 55_000, 27.25, 45, source="calibrated"),
        capacity=Capacity(0, 16_384, 256, 468_000, 16),
        tier="long-context",
        weight=1.5,
        zone="a",
        weights_version="w",
        tokenizer_digest="t",
        template_digest="p",
        features=frozenset({"tools", "n"}),
        pid=7,
        extra={"from_the_future": "kept", "not-known_2": "x" * 512},
    )
    await connect().register(sent)
    await watching.until(lambda s: ids(s) == {"a"})
    assert watching.last.entries[0].endpoint == sent


async def test_renew_is_seen(connect: Callable[[], Registry], watching: Watching, served: int) -> None:
    mine, first = connect(), endpoint("a", served)
    with pytest.raises(RegistryError, match="register first"):
        await mine.renew(first)
    await mine.register(first)
    await watching.until(lambda s: ids(s) == {"a"})
    await mine.renew(replace(first, speed=Speed(prefill_tps=123.0)))
    await watching.until(lambda s: s.entries[0].endpoint.speed.prefill_tps == 123.0)
    assert all(entry.passing for _, s in watching.seen for entry in s.entries), "a renewal is no outage"


async def test_kinds_are_kept_apart(connect: Callable[[], Registry], served: int) -> None:
    mine = connect()
    await mine.register(endpoint("a", served))
    await mine.register(endpoint("b", served, kind="rerank"))
    only = Watching(connect(), ("rerank",))
    await only.until(lambda s: ids(s) == {"b"})
    await only.close()


HOSTILE = {
    "old-contract": ("127.0.0.1", 1, {**GOOD, "contract": "99"}, "contract"),
    "cloud-metadata": ("169.254.169.254", 80, GOOD, "link-local"),
    "cloud-mapped": ("::ffff:169.254.169.254", 80, GOOD, "link-local"),
    "cloud-number": ("2852039166", 80, GOOD, "number"),
    "anywhere": ("0.0.0.0", 80, GOOD, "--advertise"),
    "not-a-name": ("a b", 80, GOOD, "host name"),
    "portless": ("127.0.0.1", 0, GOOD, "port 0"),
    "not-a-number": ("127.0.0.1", 1, {**GOOD, "weight": "NaN"}, "weight"),
    "too-heavy": ("127.0.0.1", 1, {**GOOD, "weight": "65535"}, "weight"),
    "infinite": ("127.0.0.1", 1, {**GOOD, "prefill_tps": "inf"}, "prefill_tps"),
    "junk": ("127.0.0.1", 1, {**GOOD, "tp": "\u0416" * 256}, "tp"),
    "lines": ("127.0.0.1", 1, {**GOOD, "model": "a\nb"}, "unprintable"),
    "nameless": ("127.0.0.1", 1, {"contract": CONTRACT}, "model: absent"),
}


async def test_hostile_entries_are_shown_and_not_used(
    backend: Backend, connect: Callable[[], Registry], watching: Watching, served: int
) -> None:
    taken = {id for id, (*where, _) in HOSTILE.items() if await backend.put("infermesh-llm", id, *where)}
    assert len(taken) >= len(HOSTILE) - 1, "Consul refuses 0.0.0.0 by itself"
    await connect().register(endpoint("good", served))
    await watching.until(lambda s: {line.id for line in s.rejected} == taken and ids(s) == {"good"})
    for line in watching.last.rejected:
        assert HOSTILE[line.id][3] in line.reason
        assert len(line.reason) <= 200
        assert line.reason.isprintable()
    assert not any(ids(s, passing=False) - {"good"} for _, s in watching.seen)


async def test_what_cannot_be_registered_is_refused_at_once(connect: Callable[[], Registry], served: int) -> None:
    mine = connect()
    for bad, why in [
        (endpoint("a", served, host="0.0.0.0"), "--advertise"),
        (endpoint("a", 0), "port 0"),
        (endpoint("a b", served), "id"),
        (endpoint("a", served, zone="x" * 513), "zone: 513 bytes"),
        (endpoint("a", served, extra={"dot.ted": "x"}), "dot.ted"),
    ]:
        with pytest.raises(RegistryError, match=why):
            await mine.register(bad)


async def test_sixty_four_pairs_and_no_more(connect: Callable[[], Registry], watching: Watching, served: int) -> None:
    from registry.endpoint import to_metadata

    mine, plain = connect(), endpoint("a", served)
    room = 64 - len(to_metadata(plain))
    full = replace(plain, extra={f"k{n}": "v" for n in range(room)})
    await mine.register(full)
    await watching.until(lambda s: ids(s) == {"a"})
    assert watching.last.entries[0].endpoint == full
    with pytest.raises(RegistryError, match="65 metadata keys"):
        await mine.register(replace(full, id="b", extra={**full.extra, "one": "more"}))


async def test_the_later_life_of_an_id_wins(connect: Callable[[], Registry], watching: Watching, served: int) -> None:
    first, second = endpoint("a", served), endpoint("a", served)
    old, new = connect(), connect()
    await old.register(first)
    await watching.until(lambda s: ids(s) == {"a"})
    await new.register(second)
    await watching.until(lambda s: s.entries[0].endpoint.incarnation == second.incarnation)
    count = len(watching.seen)
    await asyncio.sleep(3.5)
    await old.deregister("a")  # must not take the newer one with it
    await asyncio.sleep(1)
    lives = {entry.endpoint.incarnation for _, s in watching.seen[count - 1 :] for entry in s.entries}
    assert lives == {second.incarnation}, "the two must not fight"
    assert ids(watching.last) == {"a"}


async def test_a_killed_instance_is_gone_within_two_seconds(backend: Backend, watching: Watching) -> None:
    async with instance(backend.url, "a") as doomed, instance(backend.url, "b"):
        await watching.until(lambda s: ids(s) == {"a", "b"})
        await asyncio.sleep(2)  # in Consul's care: its first check comes up to 1 s late, and is the slow one
        doomed.kill()
        took = await watching.until(lambda s: ids(s) == {"b"}, 2)
        print(f"{backend.url.partition(':')[0]}: killed -> not passing {took:.2f} s")


async def test_a_terminated_instance_leaves_at_once(backend: Backend, watching: Watching) -> None:
    async with instance(backend.url, "a") as leaving:
        await watching.until(lambda s: ids(s) == {"a"})
        leaving.terminate()
        await watching.until(lambda s: not s.entries, LEAVING_S)
        assert await asyncio.wait_for(leaving.wait(), 5) == 0


async def test_a_registry_that_restarts_empty_is_refilled(
    backend: Backend, connect: Callable[[], Registry], watching: Watching, served: int
) -> None:
    mine = connect()
    names = {f"i{n}" for n in range(5)}
    for name in names:
        await mine.register(endpoint(name, served))
    await watching.until(lambda s: ids(s) == names)
    known_from = len(watching.seen)
    await backend.kill()
    await watching.until(lambda s: s.stale)
    await backend.start()
    back = time.monotonic()
    late = Watching(connect())  # a watcher without memory sees what the registry itself knows
    await late.until(lambda s: ids(s) == names and not s.stale)
    print(f"{backend.url.partition(':')[0]}: restarted empty -> all back {time.monotonic() - back:.2f} s")
    await watching.until(lambda s: ids(s) == names and not s.stale and not s.young)
    assert all(ids(s) == names for _, s in watching.seen[known_from:]), "what is known must not vanish"
    await late.close()


async def test_a_registry_that_restarts_empty_is_doubted(backend: Backend, watching: Watching, served: int) -> None:
    """The instances do not come back, but for all the registry knows they serve on."""
    mine = open_registry(backend.url)
    for name in "abc":
        await mine.register(endpoint(name, served))
    await watching.until(lambda s: ids(s) == {"a", "b", "c"})
    known_from = len(watching.seen)
    await backend.kill()
    await mine.close()
    await backend.start()
    back = time.monotonic()
    await watching.until(lambda s: not s.stale and s.young)
    await watching.until(lambda s: not s.entries)
    assert time.monotonic() - back >= 5, "kept at least 5 s"
    assert all(len(ids(s)) == 3 for _, s in watching.seen[known_from:-1])


async def test_a_registry_out_of_reach_leaves_the_last_known_set(
    backend: Backend, connect: Callable[[], Registry], watching: Watching, served: int
) -> None:
    mine = connect()
    await mine.register(endpoint("a", served))
    await watching.until(lambda s: ids(s) == {"a"})
    await backend.kill()
    await watching.until(lambda s: s.stale)
    # Joining meanwhile does not fail, and happens later.
    begun = time.monotonic()
    await mine.register(endpoint("late", served))
    assert time.monotonic() - begun < 3
    await asyncio.sleep(1)
    assert ids(watching.last) == {"a"}
    await backend.start()
    await watching.until(lambda s: ids(s) == {"a", "late"} and not s.stale)


async def test_a_registry_that_never_was_gives_an_empty_stale_set() -> None:
    for url in ("consul://127.0.0.1:1", "mesh://127.0.0.1:1"):
        registry = open_registry(url)
        watching = Watching(registry)
        await watching.until(lambda s: s.stale and not s.entries)
        await registry.register(endpoint("a", 1))
        await registry.deregister("a")
        await watching.close()
        await registry.close()


async def test_closing_ends_the_watches(connect: Callable[[], Registry], served: int) -> None:
    registry = connect()
    snapshots = [snapshot async for snapshot in _closing_after_first(registry)]
    assert len(snapshots) == 1


async def _closing_after_first(registry: Registry) -> AsyncIterator[Any]:
    async for snapshot in registry.watch():
        yield snapshot
        await registry.close()
