"""Rows 17-20: processes that are told to leave, and gateways that die."""

from __future__ import annotations

import asyncio
import math
import signal
import time

from tests.fault.fleet import fleet
from tests.fault.load import listed, streams
from tests.fault.matrix import Ground, Measured, Row, Skipped
from tests.fault.rest import chat, post, session
from tests.kit.consul import ConsulServer
from tests.kit.debian import NoProgram

THREE = ("a", "b", "c")


async def rolling_restart(ground: Ground) -> Measured:
    """Every instance and both gateways, one after the other, on a real Consul, under load of the Python client."""
    try:
        consul = ConsulServer()
    except NoProgram as why:
        raise Skipped(str(why)) from None
    with consul:
        async with fleet(ground.folder, *THREE, gateways=2, registry=consul.url) as mesh:
            codes = []
            async with streams(mesh.client, 16, tokens=30) as load:
                await asyncio.sleep(2)
                for id in THREE:
                    child = mesh.llms[id]
                    child.popen.send_signal(signal.SIGTERM)
                    codes.append(await asyncio.to_thread(child.popen.wait, 20))
                    mesh.again(id)
                    await mesh.healthy()
                    await asyncio.sleep(1)
                for number in range(2):
                    child = mesh.gateways[number]
                    child.popen.send_signal(signal.SIGTERM)
                    codes.append(await asyncio.to_thread(child.popen.wait, 20))
                    await mesh.started(mesh.gateway_again(number))
                    await mesh.healthy()
                    await asyncio.sleep(2)
            slowest = max(told.seconds for told in load.done)
            text = f"3 instances and 2 gateways restarted, exit codes {codes}; {load}; slowest stream {slowest:.2f} s"
            return Measured(not load.failures and codes == [0] * 5, text)


async def hard_stop(ground: Ground) -> Measured:
    """A second SIGTERM while streams run, then a grace that is too short for them."""
    async with fleet(ground.folder, *THREE, flags=("--grace-s", "1")) as mesh:
        async with streams(mesh.client, 12, tokens=100) as load:
            took, codes = [], []
            for id, signals in (("a", 2), ("b", 1)):
                await asyncio.sleep(2)
                child, at = mesh.llms[id], time.monotonic()
                for number in range(signals):
                    await asyncio.sleep(0.3 * bool(number))
                    child.popen.send_signal(signal.SIGTERM)
                codes.append(await asyncio.to_thread(child.popen.wait, 20))
                took.append(time.monotonic() - at)
                mesh.again(id)
                await mesh.healthy()
        gone = [f"gone after {seconds:.1f} s (exit {code})" for seconds, code in zip(took, codes, strict=True)]
        text = f"second SIGTERM: {gone[0]}; grace of 1 s over: {gone[1]}; {load}"
        return Measured(took[0] < 2 and took[1] < 5 and codes[1] == 0 and not load.failures, text)


async def gateway_killed(ground: Ground) -> Measured:
    """Nobody reads what its instances make any more."""
    async with fleet(ground.folder, *THREE) as mesh:
        took = []
        for _ in range(ground.runs(3)):
            client = await mesh.dial(mesh.gateways[0].told()["grpc"])
            load = asyncio.create_task(_abandoned(client))
            await asyncio.sleep(1.0)
            had = await mesh.busy()
            mesh.gateways[0].kill()
            took.append(await mesh.idle(10))
            await load
            await mesh.started(mesh.gateway_again(0))
            await mesh.healthy()
        kv = [(await mesh.load(id)).kv_used_ratio for id in THREE]
        empty = ", ".join(f"{seconds * 1000:.0f}" for seconds in took)
        text = f"{had} streams in the engines; 0 after {empty} ms; KV in use {max(kv):g}"
        return Measured(max(took) <= 2 and had > 0 and max(kv) == 0, text)


async def _abandoned(client: object) -> None:
    """Long streams, to whatever end."""
    async with streams(client, 24, tokens=200):  # type: ignore[arg-type]
        await asyncio.sleep(0.5)


async def one_of_two_gateways(ground: Ground) -> Measured:
    """Whoever speaks to the other one notices nothing; the client that knows both goes on with it."""
    async with fleet(ground.folder, *THREE, gateways=2) as mesh:
        first, second = (str(child.told()["grpc"]) for child in mesh.gateways)
        spared, both = await mesh.dial(second), await mesh.dial(first, second)
        async with streams(spared, 8, tokens=20) as others, streams(both, 8, tokens=20) as moving, session() as one:
            await asyncio.sleep(2)
            at = time.monotonic()
            mesh.gateways[0].kill()
            await asyncio.sleep(1)
            rest = await post(one, mesh.http(1), chat())
            await asyncio.sleep(3)
        begun = [told for told in moving.done if told.at and told.at[0] < at < told.ended]
        cut = [told.error for told in begun if told.error]
        new = [told.error for told in moving.done if told.error and told not in begun]
        first_again = min((told.at[0] - at for told in moving.done if told.at and told.at[0] > at), default=math.inf)
        text = (
            f"clients of the other: {others}; of both: {len(new)} errors beside {len(cut)} of {len(begun)} streams "
            f"cut with their gateway{listed(cut + new)}; served again after {first_again * 1000:.0f} ms"
        )
        told_so = all(error.startswith("stream_lost") for error in cut)
        return Measured(not others.failures and not new and told_so and rest.status == 200, text)


ROWS = (
    Row(17, "SIGTERM under load: all, in turn", "0 failed requests, every exit code 0", rolling_restart, 180),
    Row(18, "second SIGTERM; grace over", "gone at once; streams go on elsewhere, 0 failed", hard_stop),
    Row(19, "gateway SIGKILL", "its work is out of all engines within 2 s, KV freed", gateway_killed),
    Row(
        20,
        "one of two gateways dies",
        "others unaffected; a client of both goes on, streams that had begun end typed or whole",
        one_of_two_gateways,
    ),
)
