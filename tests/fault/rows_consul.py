"""Rows 34-37, 43: Consul's servers and agents die, under load. The mesh goes on with whom it knows."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp

from tests.fault.fleet import Fleet, fleet
from tests.fault.load import Load, streams
from tests.fault.matrix import Ground, Measured, Row, Skipped
from tests.kit.consul import ConsulServer
from tests.kit.debian import NoProgram

JOIN_S = 5.0
TWO = ("a", "b")


@asynccontextmanager
async def servers(count: int = 1) -> AsyncIterator[ConsulServer]:
    try:
        consul = ConsulServer(servers=count)
    except NoProgram as why:
        raise Skipped(str(why)) from None
    try:
        await asyncio.to_thread(consul.start)
        yield consul
    finally:
        await asyncio.to_thread(consul.close)


def url_of(consul: ConsulServer, index: int) -> str:
    return f"consul://127.0.0.1:{consul.port(index)}"


async def stale(mesh: Fleet) -> bool:
    """What the gateway tells of the registry at its own door."""
    async with aiohttp.ClientSession(trust_env=False) as one, one.get(f"http://{mesh.http()}/readyz") as reply:
        return bool((await reply.json())["registry_stale"])


async def joins(mesh: Fleet, id: str) -> float:
    """Seconds from serving to being in work, for a new instance."""
    child = mesh.add_llm(id)
    await mesh.started(child)
    return await mesh.until(lambda states: states.get(id) == "healthy", 40)


async def _watching(mesh: Fleet, seconds: float, *ids: str) -> int:
    """How often one of these was seen out of work."""
    bad, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        states = await mesh.states()
        bad += any(states.get(id) != "healthy" for id in ids or TWO)
        await asyncio.sleep(0.1)
    return bad


def judged(load: Load, bad: int, joined: float, text: str, fine: bool = True) -> Measured:
    whole = f"{text}; a new instance in work {joined:.1f} s after it could be; {bad} times a known one out; {load}"
    return Measured(fine and not bad and not load.failures and joined <= JOIN_S, whole)


async def leader_lost(ground: Ground) -> Measured:
    async with servers(3) as consul:
        leader = await asyncio.to_thread(consul.leader)
        other = (leader + 1) % 3
        async with fleet(ground.folder, *TWO, registry=url_of(consul, other)) as mesh:
            async with streams(mesh.client, 8, tokens=20) as load:
                await asyncio.sleep(1)
                consul.kill(leader)
                bad = await _watching(mesh, 10)
                joined = await joins(mesh, "new")
            return judged(load, bad, joined, "leader killed")


async def quorum_lost(ground: Ground) -> Measured:
    async with servers(3) as consul:
        async with fleet(ground.folder, *TWO, registry=url_of(consul, 0)) as mesh:
            async with streams(mesh.client, 8, tokens=20) as load:
                await asyncio.sleep(1)
                consul.kill(1)
                consul.kill(2)
                lost = time.monotonic()
                bad = await _watching(mesh, ground.seconds(20))
                flagged = await stale(mesh)
                mesh.add_llm("new")
                bad += await _watching(mesh, 10)
                await asyncio.to_thread(consul.start)
                joined = await mesh.until(lambda states: states.get("new") == "healthy", 30)
                away = time.monotonic() - lost
            return judged(load, bad, joined, f"2 of 3 away for {away:.0f} s, registry_stale {flagged}", flagged)


async def all_down(ground: Ground) -> Measured:
    """All servers away; meanwhile an instance starts and another one leaves."""
    async with servers(3) as consul:
        async with fleet(ground.folder, *TWO, "leaver", registry=url_of(consul, 0)) as mesh:
            seconds = ground.seconds(60)
            async with streams(mesh.client, 8, tokens=20) as load:
                await asyncio.sleep(1)
                await asyncio.to_thread(consul.kill)
                bad = await _watching(mesh, seconds / 3)
                mesh.llms["leaver"].ask()
                new = mesh.add_llm("new")
                bad += await _watching(mesh, seconds / 3)
                serves = new.serves
                left = mesh.llms["leaver"].ended
                bad += await _watching(mesh, seconds / 3)
                flagged = await stale(mesh)
                await asyncio.to_thread(consul.start)
                joined = await mesh.until(lambda states: states.get("new") == "healthy", 30)
                bad += await _watching(mesh, 3)
            text = f"all away for {seconds:g} s, stale {flagged}, one started: {serves}, one left: {left}"
            return judged(load, bad, joined, text, flagged and serves and left)


async def empty(ground: Ground) -> Measured:
    """The dev server forgets everything and begins to count anew."""
    async with servers() as consul:
        async with fleet(ground.folder, *TWO, "c", registry=consul.url) as mesh:
            async with streams(mesh.client, 8, tokens=20) as load:
                slowest, bad, indices = 0.0, 0, []
                for _ in range(ground.runs(3)):
                    await asyncio.sleep(2)
                    indices.append(_index(consul))
                    await asyncio.to_thread(consul.restart_empty)
                    indices.append(_index(consul))
                    watch = asyncio.create_task(_watching(mesh, 8, *TWO, "c"))
                    slowest = max(slowest, await _listed(lambda: _passing(consul), {*TWO, "c"}))
                    bad += await watch
                joined = await joins(mesh, "new")
            back = "index " + ", ".join(f"{a} -> {b}" for a, b in zip(indices[::2], indices[1::2], strict=True))
            return judged(load, bad, joined, f"{back}; all registered again after {slowest:.1f} s", slowest <= JOIN_S)


def _index(consul: ConsulServer) -> int:
    return max(
        (int(item["Service"]["ModifyIndex"]) for item in consul.get("/v1/health/service/infermesh-llm")), default=0
    )


def _passing(consul: ConsulServer) -> set[str]:
    return {item["Service"]["ID"] for item in consul.get("/v1/health/service/infermesh-llm?passing")}


async def _listed(read: Callable[[], set[str]], wanted: set[str]) -> float:
    begun = time.monotonic()
    while time.monotonic() - begun < 20:
        if await asyncio.to_thread(read) >= wanted:
            return time.monotonic() - begun
        await asyncio.sleep(0.05)
    return math.inf


async def agent_dies(ground: Ground) -> Measured:
    """The instances' own agent is killed: Consul calls all of its services critical. They serve happily."""
    async with servers() as consul:
        agent = await asyncio.to_thread(consul.start_agent)
        async with fleet(ground.folder, registry=consul.url) as mesh:
            mesh.registry = agent
            for id in TWO:
                mesh.add_llm(id)
            await mesh.healthy()
            async with streams(mesh.client, 8, tokens=20) as load:
                await asyncio.sleep(1)
                consul.kill_agent()
                critical = math.inf
                begun = time.monotonic()
                bad = states_seen = 0
                while time.monotonic() - begun < ground.seconds(40):
                    if math.isinf(critical) and not _passing(consul):
                        critical = time.monotonic() - begun
                    states = await mesh.states()
                    bad += any(states.get(id) not in ("healthy", "suspect") for id in TWO)
                    states_seen += any(states.get(id) == "suspect" for id in TWO)
                    await asyncio.sleep(0.2)
            text = (
                f"Consul calls them critical after {critical:.1f} s; out of work {bad} times, suspect "
                f"{states_seen} times, seen over {ground.seconds(40):g} s; {load}"
            )
            return Measured(not bad and not load.failures and critical < 40, text)


ROWS = (
    Row(34, "Consul's leader killed", "0 failed, known ones in work, a new one joins within 5 s", leader_lost, 180),
    Row(
        35,
        "Consul's quorum lost",
        "0 failed, registry_stale told, a new one joins within 5 s of the return",
        quorum_lost,
        240,
    ),
    Row(
        36,
        "Consul all down",
        "0 failed; starts and stops go on; the new one joins within 5 s of the return",
        all_down,
        1200,
    ),
    Row(37, "Consul restarted empty, index backwards", "0 failed, all registered again within 5 s", empty, 180),
    Row(
        43, "the instances' agent dies", "0 failed: critical by Consul alone takes nobody out of work", agent_dies, 180
    ),
)
