"""Real processes that stand still, and operators that take instances out: who works on, and who hears of it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from infermesh.client import AsyncClient, MeshError
from tests.fault.fleet import Fleet, fleet
from tests.fault.load import streams
from tests.kit.children import ask
from tests.kit.mesh import until

pytestmark = pytest.mark.slow


async def listed(mesh: Fleet, gateway: int) -> dict[str, dict[str, object]]:
    """`infermesh instances --json` of one gateway."""
    address = str(mesh.gateways[gateway].told()["grpc"])
    rows = json.loads(await asyncio.to_thread(ask, "instances", "--json", "--gateway", address))
    return {row["id"]: row for row in rows}


async def healthy(mesh: Fleet, client: AsyncClient) -> bool:
    return set((await mesh.states(client)).values()) == {"healthy"}


async def test_an_engine_that_stands_still_loses_its_streams_to_another_and_says_why(tmp_path: Path) -> None:
    """Its health says SERVING all the while, and its connections are fine."""
    async with fleet(tmp_path, "a", "b", breakable=True) as mesh, streams(mesh.client, 4, tokens=60) as load:
        await until(lambda: len(load.on("a", time.monotonic())) >= 1, 20)
        hurt = load.on("a", time.monotonic())
        mesh.broken("a", wedge=True)
        await until(lambda: all(told.ended for told in hurt), 20)
        assert all(told.ok for told in hurt), [told.error for told in hurt]
        row = (await listed(mesh, 0))["a"]
        assert row["state"] in ("ejected", "probation") and (await mesh.states())["b"] == "healthy"
        assert row["state"] == "probation" or "nothing has moved" in str(row["why"])
        assert (await mesh.metrics())["infermesh_gateway_abandoned_total"] >= len(hurt)
        mesh.broken("a")
        assert not load.failures


async def test_a_ban_holds_on_every_gateway_within_two_seconds_and_over_restarts(tmp_path: Path) -> None:
    files = [("--bans-file", str(tmp_path / f"{name}.bans")) for name in ("one", "two")]
    async with fleet(tmp_path, "a", "b", gateway_flags=files[0]) as mesh:
        await mesh.started(mesh.add_gateway(*files[1]))
        first, second = (str(gateway.told()["grpc"]) for gateway in mesh.gateways)
        other = await mesh.dial(second)
        await until(lambda: healthy(mesh, other), 20)

        async def banned() -> bool:
            return (await mesh.states(other)).get("a") == "banned"

        told = await asyncio.to_thread(ask, "ban", "a", "--why", "fan is broken", "--gateway", first)
        assert "until `infermesh unban a`" in told
        begun = time.monotonic()
        await until(banned, 10)
        assert time.monotonic() - begun <= 2.0
        row = (await listed(mesh, 1))["a"]
        assert str(row["why"]).startswith("banned by ") and str(row["why"]).endswith(": fan is broken")
        answers = [await other.chat("hi", model="chat", max_tokens=2) for _ in range(4)]
        assert {answer.served.instance_id for answer in answers} == {"b"}
        for gateway in mesh.gateways:  # all of them: only the files know it now
            gateway.ask()
        await until(lambda: all(gateway.ended for gateway in mesh.gateways), 20)
        reborn = mesh.add_gateway(*files[1])
        await mesh.started(reborn)
        address = str(reborn.told()["grpc"])
        other = mesh.client = await mesh.dial(address)
        await until(banned, 10)
        await asyncio.to_thread(ask, "unban", "a", "--gateway", address)
        await mesh.healthy()
        again = await asyncio.to_thread(ask, "unban", "a", "--gateway", address, code=1)
        assert again == ""
        unknown = await asyncio.to_thread(ask, "ban", "typo", "--gateway", address, "--json")
        assert json.loads(unknown)["registered"] is False  # told, as a ban is also for one that is to come


async def test_a_drain_is_taken_back_while_work_still_runs_and_not_a_signal(tmp_path: Path) -> None:
    async with fleet(tmp_path, "a", flags=("--grace-s", "60")) as mesh:
        async with streams(mesh.client, 1, tokens=200) as load:
            await until(lambda: load.all and load.all[0].at, 20)
            await mesh.client.drain("a")
            await mesh.until(lambda states: states.get("a") == "draining", 5)
            assert await mesh.client.undrain("a") == 1
            await mesh.healthy()
            with pytest.raises(MeshError, match="no drain that could be taken back"):
                await mesh.client.undrain("a")
            mesh.llms["a"].ask()
            assert await mesh.until(lambda states: states.get("a") == "draining", 10) <= 10
            with pytest.raises(MeshError, match="no drain that could be taken back"):
                await mesh.client.undrain("a")
            await until(lambda: load.all[0].ended, 40)
        assert load.all[0].ok, load.all[0].error
