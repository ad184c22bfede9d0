"""Rows 64, 68, 70: a tenant that floods, versions that differ, and three times more than there is room for."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import time
from pathlib import Path

import aiohttp
import yaml

from infermesh.client import AsyncClient
from tests.fault.fleet import Fleet, fleet
from tests.fault.load import Told, ask, listed, quantile, streams
from tests.fault.matrix import Ground, Measured, Row, Skipped
from tests.fault.rest import Answer, chat, post, session
from tests.kit.children import ROOT
from tests.kit.mesh import until

OLD = "12648db"  # the last commit of the release before resume, health as a state machine and grants


async def flood(ground: Ground) -> Measured:
    """One tenant asks ten times as much as the other, beyond what the fleet can do."""
    lines = [{"sha256": hashlib.sha256(name.encode()).hexdigest(), "tenant": name} for name in ("calm", "greedy")]
    (ground.folder / "keys.yaml").write_text(yaml.safe_dump({"version": 1, "keys": lines}))
    flags = ("--keys", str(ground.folder / "keys.yaml"), "--queue-requests", "64", "--queue-wait-s", "5")
    instance = ("--max-running", "8", "--step-ms", "20")
    async with fleet(ground.folder, "a", "b", flags=instance, gateway_flags=flags, api_key="calm") as mesh:
        greedy = AsyncClient(mesh.grpc, api_key="greedy", timeout=30)
        async with greedy, streams(mesh.client, 4, tokens=10, pause_s=0.1) as load:
            await asyncio.sleep(5)
            at = time.monotonic()
            async with streams(greedy, 60, tokens=10) as other:
                await asyncio.sleep(ground.seconds(15))
                end = time.monotonic()
        before = quantile((told.ttft_s for told in load.between(0, at)), 0.99)
        during = [told for told in load.between(at, end) if not told.error]
        after = quantile((told.ttft_s for told in during), 0.99)
        text = (
            f"the calm one's first token p99 {after * 1000:.0f} ms ({before * 1000:.0f} ms before, "
            f"{after / before:.2f} x), {load}; the greedy one: {other}"
        )
        return Measured(after <= 1.5 * before + 0.1 and not load.failures, text)


async def overload(ground: Ground) -> Measured:
    """As much as fits, then three times that: what is served stays, what is not is told so at once."""
    instance = ("--max-running", "8", "--max-waiting", "2", "--step-ms", "20", "--kv-us-per-ktoken", "0.001")
    gateway = ("--queue-requests", "16", "--queue-wait-s", "2")
    async with fleet(ground.folder, "a", "b", flags=instance, gateway_flags=gateway) as mesh:
        seconds = ground.seconds(12)
        peak, _ = await _served(mesh, 20, seconds)  # 16 slots and a little: never idle
        served, answers = await _served(mesh, 60, seconds)
        left = await mesh.leftovers()
    refused = [answer for answer in answers if answer.status == 429]
    others = [answer.error for answer in answers if answer.error and answer.status != 429]
    at_once = [answer for answer in refused if answer.code == "queue_full"]
    p99 = quantile((answer.seconds for answer in at_once), 0.99)
    told = all("retry-after" in answer.headers for answer in refused)
    text = (
        f"{served / seconds:.0f} a second at 3 x, {peak / seconds:.0f} at 1 x ({served / peak:.0%}); "
        f"{len(refused)} refused, {len(at_once)} of them at the door, p99 {p99 * 1000:.0f} ms, all with retry-after: "
        f"{told}{listed(others)}; left over: {left or 'nothing'}"
    )
    return Measured(served >= 0.9 * peak and p99 <= 0.05 and told and not others and not left, text)


async def _served(mesh: Fleet, callers: int, seconds: float) -> tuple[int, list[Answer]]:
    """Callers who ask again at once when answered, and after 0.2 s when refused. How many answers were whole."""
    answers: list[Answer] = []

    async def caller(one: aiohttp.ClientSession) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            answer = await post(one, mesh.http(), chat(20))
            answers.append(answer)
            if answer.status != 200:
                await asyncio.sleep(0.2)

    async with session() as one:
        await asyncio.gather(*(caller(one) for _ in range(callers)))
    return sum(not answer.error for answer in answers), answers


async def mixed_versions(ground: Ground) -> Measured:
    """An old gateway with new instances, and a new gateway with an old instance, which dies on the way."""
    old = await asyncio.to_thread(_checkout, ground.folder / "old")
    async with fleet(ground.folder, "a", "b") as mesh:
        mesh.add_gateway(root=old)
        mesh.add_llm("old", root=old)
        await mesh.started(mesh.gateways[1], mesh.llms["old"])
        await mesh.healthy()
        found = {}
        for name, number in (("new gateway", 0), ("old gateway", 1)):
            client = await mesh.dial(mesh.gateways[number].told()["grpc"])
            await until(lambda client=client: _all_healthy(mesh, client), 20)
            async with streams(client, 12, tokens=20) as load:
                await asyncio.sleep(3)
            served = {told.served.instance_id for told in load.done}
            found[name] = (load, served)
        client = await mesh.dial(mesh.gateways[0].told()["grpc"])
        told = [Told(60, time.monotonic()) for _ in range(12)]
        asked = asyncio.gather(*(ask(client, one) for one in told))
        await asyncio.sleep(0.8)
        mesh.llms["old"].kill()
        await asked
        hurt = [one for one in told if one.served.instance_id == "old"]
        moved = [one.error for one in told if one.error]
    text = "; ".join(f"{name}: {load}, served by {', '.join(sorted(who))}" for name, (load, who) in found.items())
    text += f"; old instance killed under the new gateway: {len(hurt)} streams hit, {len(moved)} failed{listed(moved)}"
    fine = all(not load.failures and len(who) == 3 for load, who in found.values())
    typed = all(error.startswith("stream_lost") for error in moved)
    return Measured(fine and typed, text)


async def _all_healthy(mesh: Fleet, client: AsyncClient) -> bool:
    states = await mesh.states(client)
    return all(states.get(id) == "healthy" for id in mesh.llms)


def _checkout(folder: Path) -> Path:
    """The tree of the old version, without touching this one."""
    folder.mkdir()
    made = subprocess.run(["git", "archive", OLD], cwd=ROOT, capture_output=True, check=False)
    if made.returncode:
        raise Skipped(f"commit {OLD} is not in this clone: {made.stderr.decode().strip()}")
    subprocess.run(["tar", "-x"], cwd=folder, input=made.stdout, check=True)
    return folder


ROWS = (
    Row(
        64,
        "one tenant floods, ten times the other's load",
        "the other's first token p99 at most 1.5 x (and 0.1 s), 0 failed",
        flood,
    ),
    Row(68, "mixed versions: old gateway, old instance", "both ways serve, all words right", mixed_versions, 240),
    Row(
        70, "three times the load that fits", "at least 90 % of peak goodput, refusals p99 within 50 ms", overload, 180
    ),
)
