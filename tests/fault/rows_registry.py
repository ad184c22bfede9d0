"""Rows 38-42: what Consul says is wrong, too much, or hostile."""

from __future__ import annotations

import asyncio
import time
import urllib.error
from typing import Any

from registry.endpoint import Endpoint, to_metadata
from tests.fault.fleet import fleet
from tests.fault.load import MODEL, quantile, streams
from tests.fault.matrix import Ground, Measured, Row
from tests.fault.rows_consul import TWO, _watching, joins, judged, servers, stale
from tests.kit.moody_consul import MoodyConsul

MOODS = ("429", "500", "slow", "half", "junk", "backwards")


async def churn(ground: Ground) -> Measured:
    """A service of the mesh's own name flaps 50 times a second."""
    async with servers() as consul, MoodyConsul(consul.port()) as moody:
        async with fleet(ground.folder, *TWO, registry=consul.url) as quiet:
            mesh = quiet
            mesh.registry = moody.url
            mesh.add_gateway()
            await mesh.started(mesh.gateways[1])
            client = await mesh.dial(mesh.gateways[1].told()["grpc"])
            async with streams(client, 8, tokens=20) as load:
                await asyncio.sleep(2)
                before, flaps, seconds = moody.queries, 0, ground.seconds(10)
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    entry = _entry(f"flapping-{flaps % 5}", "127.0.0.1", 9)
                    await asyncio.to_thread(consul.put, "/v1/catalog/register", entry)
                    flaps += 1
                    await asyncio.sleep(0.02)
                rate = (moody.queries - before) / seconds
                for number in range(5):
                    gone = {"Node": "elsewhere", "ServiceID": f"flapping-{number}"}
                    await asyncio.to_thread(consul.put, "/v1/catalog/deregister", gone)
            text = f"{flaps / seconds:.0f} changes a second: {rate:.1f} queries a second of a gateway (3 kinds); {load}"
            return Measured(rate <= 16 and flaps / seconds > 15 and not load.failures, text)


def _entry(id: str, host: str, port: int, **meta: str) -> dict[str, Any]:
    """A line in the catalogue that no agent has checked."""
    fine = to_metadata(Endpoint(id, "llm", "127.0.0.1", 9, MODEL, incarnation=5)) | meta
    service = {"Service": "infermesh-llm", "ID": id, "Address": host, "Port": port, "Meta": fine}
    return {"Node": "elsewhere", "Address": "127.0.0.1", "Service": service}


async def moods(ground: Ground) -> Measured:
    async with servers() as consul, MoodyConsul(consul.port()) as moody:
        async with fleet(ground.folder, *TWO, registry=moody.url) as mesh:
            async with streams(mesh.client, 8, tokens=20) as load:
                bad, seen, rates = 0, [], []
                for mood in MOODS:
                    moody.mood, before = mood, moody.queries
                    bad += await _watching(mesh, ground.seconds(8))
                    seen.append(f"{mood}{' stale' if await stale(mesh) else ''}")
                    rates.append((moody.queries - before) / ground.seconds(8))
                moody.mood = ""
                joined = await joins(mesh, "new")
            text = f"{', '.join(seen)}; at most {max(rates):.1f} queries a second"
            return judged(load, bad, joined, text, max(rates) <= 16)


async def dead_address(ground: Ground) -> Measured:
    """Entries at addresses where nobody listens, and one where packets vanish."""
    async with servers() as consul:
        async with fleet(ground.folder, *TWO, registry=consul.url) as mesh:
            async with streams(mesh.client, 8, tokens=20) as load:
                await asyncio.sleep(3)
                at = time.monotonic()
                for id, host in (("dead-1", "127.0.0.1"), ("dead-2", "127.0.0.2"), ("void", "10.255.255.1")):
                    await asyncio.to_thread(consul.put, "/v1/catalog/register", _entry(id, host, 9))
                bad = await _watching(mesh, ground.seconds(10))
                states = await mesh.states()
            calm = quantile((told.ttft_s for told in load.between(0, at)), 0.99)
            late = quantile((told.ttft_s for told in load.between(at, time.monotonic())), 0.99)
            named = {id: state for id, state in states.items() if id not in TWO}
            text = f"first token p99 {late * 1000:.0f} ms ({calm * 1000:.0f} ms before); listed as {named}; {load}"
            fine = not bad and not load.failures and late < calm + 0.2
            return Measured(fine and bool(named) and "healthy" not in named.values(), text)


async def twice(ground: Ground) -> Measured:
    """Two processes with one id: the one that came last has it."""
    async with servers() as consul:
        async with fleet(ground.folder, *TWO, registry=consul.url) as mesh:
            async with streams(mesh.client, 8, tokens=20) as load:
                await asyncio.sleep(1)
                older = mesh.llms["a"]
                newer = mesh.children.run("a-too", _again(older, mesh.folder))
                await mesh.started(newer)
                await asyncio.sleep(5)
                instances = {one.id: one for one in await mesh.client.instances()}
                served = instances["a"].address == newer.address and instances["a"].state == "healthy"
                warned = "another process has registered this id" in older.text()
            text = f"the newer one is listed and in work: {served}; the older one says so in its log: {warned}; {load}"
            return Measured(served and warned and not load.failures, text)


def _again(child: Any, folder: Any) -> list[str]:
    """The same command line, ready file apart."""
    words = list(child.popen.args)
    at = words.index("--ready-file")
    return words[:at] + words[at + 2 :]


async def hostile(ground: Ground) -> Measured:
    """Whoever can write to Consul can write anything; each such entry is refused, shown, and never dialled."""
    fine = to_metadata(Endpoint("x", "llm", "127.0.0.1", 9, MODEL, incarnation=5))
    junk = "x" * 512
    entries = {
        "metadata-service": _entry("metadata-service", "169.254.169.254", 80),
        "ssh": _entry("ssh", "127.0.0.1", 22),
        "heavy": _entry("heavy", "127.0.0.1", 9001, weight="65535"),
        "nan": _entry("nan", "127.0.0.1", 9002, prefill_tps="NaN", weight="NaN"),
        "junk": _entry("junk", "127.0.0.1", 9003, **{key: junk for key in fine}),
        "no-port": _entry("no-port", "127.0.0.1", 0),
        "everywhere": _entry("everywhere", "0.0.0.0", 9004),
        "multicast": _entry("multicast", "224.0.0.1", 9005),
        "not a name": _entry("not a name", "127.0.0.1", 9006),
        "no-meta": {**_entry("no-meta", "127.0.0.1", 9007)},
    }
    entries["no-meta"]["Service"]["Meta"] = {}
    async with servers() as consul:
        async with fleet(ground.folder, *TWO, registry=consul.url) as mesh:
            async with streams(mesh.client, 8, tokens=20) as load:
                unwritten = []
                for name, entry in entries.items():
                    try:
                        await asyncio.to_thread(consul.put, "/v1/catalog/register", entry)
                    except urllib.error.HTTPError as error:
                        error.close()
                        unwritten.append(name.strip())
                bad = await _watching(mesh, 6)
                listed = {one.id: one for one in await mesh.client.instances()}
                joined = await joins(mesh, "new")
            shown = {id: one for id, one in listed.items() if id not in TWO}
            reasons = {id.strip(): one.rejected_reason for id, one in shown.items() if one.state == "rejected"}
            dialled = sorted(id.strip() for id, one in shown.items() if one.state != "rejected")
            lost = [
                name.strip() for name in entries if name not in shown and name.strip() not in (*unwritten, *reasons)
            ]
            why = "; ".join(f"{id}: {reason[:60]}" for id, reason in sorted(reasons.items()))
            text = (
                f"{len(reasons)} refused ({why}); dialled: {dialled or 'none'}; not shown: {lost or 'none'}; "
                f"not taken by Consul: {unwritten}"
            )
            return judged(load, bad, joined, text, not dialled and not lost)


ROWS = (
    Row(38, "50 changes a second in Consul", "at most some 4 queries a second and kind, 0 failed", churn, 180),
    Row(39, "Consul says 429, 500, slowly, half, junk, old", "known ones stay, bounded queries, 0 failed", moods, 240),
    Row(40, "stale entries at dead addresses", "never on the path of a request", dead_address),
    Row(41, "one id, two processes", "the newest has it, the older one says so, 0 failed", twice),
    Row(42, "hostile registrations", "each refused and shown with its reason, none dialled, 0 failed", hostile),
)
