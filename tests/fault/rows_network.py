"""Rows 21-28: the network between a gateway and an instance. Hosts are network namespaces; what the kernel here cannot
do to packets (delay, rate, corruption), a proxy does to bytes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
import trustme

from tests.fault.fleet import Fleet, fleet
from tests.fault.load import Told, ask, listed, quantile, streams
from tests.fault.matrix import Ground, Measured, Row, Skipped
from tests.kit import namespace
from tests.kit.fault_proxy import FaultProxy, Faults
from tests.kit.namespace import Host

NEXT_TOKEN_S = 3.0
NOTICED_S = 2.0
TLS_NAME = "mesh.internal"


@asynccontextmanager
async def far_fleet(ground: Ground) -> AsyncIterator[tuple[Fleet, Host]]:
    """`a` and `b` beside the gateway, `far` on a host of its own."""
    if why := namespace.why_not():
        raise Skipped(why)
    with Host() as host:
        async with fleet(ground.folder, "a", "b", host=host.here) as mesh:
            try:
                mesh.add_llm("far", host=host.there, prefix=host.enter)
                await mesh.healthy()
                yield mesh, host
            finally:
                host.heal()


@asynccontextmanager
async def proxied_fleet(
    ground: Ground, *flags: str, gateway_flags: tuple[str, ...] = ()
) -> AsyncIterator[tuple[Fleet, FaultProxy]]:
    """`a` and `b` as they are, `far` behind a proxy."""
    async with AsyncExitStack() as stack:
        made = fleet(ground.folder, "a", "b", flags=flags, gateway_flags=gateway_flags)
        mesh = await stack.enter_async_context(made)
        proxy = await stack.enter_async_context(FaultProxy())
        child = mesh.add_llm("far", "--advertise", proxy.address, *flags)
        await mesh.started(child)
        proxy.target = ("127.0.0.1", int(child.told()["port"]))
        await mesh.healthy()
        yield mesh, proxy


async def _cut(ground: Ground, runs: int, cut: Callable[[Host], None]) -> Measured:
    """The same fault again and again, under streams; the far host is healed in between."""
    async with far_fleet(ground) as (mesh, host):
        nexts: list[float] = []
        noticed: list[float] = []
        async with streams(mesh.client, 18) as load:
            await asyncio.sleep(4)
            for _ in range(ground.runs(runs)):
                await asyncio.sleep(1.5)
                at = time.monotonic()
                hurt = load.on("far", at)
                await asyncio.to_thread(cut, host)
                noticed.append(await mesh.until(lambda states: states.get("far") != "healthy", 10, at))
                await asyncio.sleep(max(0.0, 3.5 - (time.monotonic() - at)))
                nexts += [told.next_after(at) for told in hurt if told.at and told.at[0] < at]
                await asyncio.to_thread(host.heal)
                await mesh.healthy(within_s=90)
        text = (
            f"{len(noticed)} runs; out of work after {quantile(noticed, 0.5):.2f} s, at most {max(noticed):.2f} s; "
            f"{len(nexts)} streams hit, next token after at most {max(nexts, default=math.nan):.2f} s; {load}"
        )
        good = max(noticed) <= NOTICED_S and bool(nexts) and max(nexts) < NEXT_TOKEN_S
        return Measured(good and not load.failures, text)


async def black_hole(ground: Ground) -> Measured:
    return await _cut(ground, 5, lambda host: host.drop())


async def one_way(ground: Ground) -> Measured:
    return await _cut(ground, 5, lambda host: host.drop(outgoing=False))


async def reset(ground: Ground) -> Measured:
    return await _cut(ground, 3, lambda host: host.reject())


async def loss(ground: Ground) -> Measured:
    async with far_fleet(ground) as (mesh, host):
        await asyncio.to_thread(host.lose, 0.1)
        return await _nothing_ejected(mesh, ground.seconds(40), "10 % of all packets lost, both ways")


async def late(ground: Ground) -> Measured:
    async with proxied_fleet(ground) as (mesh, proxy):
        proxy.faults = Faults(latency_s=0.1, jitter_s=0.05)  # each way: 200 +- 100 ms there and back
        return await _nothing_ejected(mesh, ground.seconds(40), "200 ms there and back, +- 100 ms")


async def _nothing_ejected(mesh: Fleet, seconds: float, fault: str) -> Measured:
    """Whether the instance behind a bad line stays in work, and works."""
    bad = 0
    before = await mesh.metrics()
    async with streams(mesh.client, 12, tokens=30) as load:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            bad += (await mesh.states()).get("far") != "healthy"
            await asyncio.sleep(0.1)
    served = sum(told.served.instance_id == "far" for told in load.done)
    name = "infermesh_gateway_ejections_total"
    ejected = (await mesh.metrics()).get(name, 0) - before.get(name, 0)
    text = f"{fault} for {seconds:g} s: {ejected:g} ejections, {bad} times seen out of work; served {served}; {load}"
    return Measured(not ejected and not bad and served > 0 and not load.failures, text)


async def thin(ground: Ground) -> Measured:
    """An instance that makes more than its line carries. Pings queue behind tokens, so its streams may move."""
    async with proxied_fleet(ground, "--step-ms", "2") as (mesh, proxy):
        gateway = psutil.Process(mesh.gateways[0].pid)
        before = gateway.memory_info().rss
        async with streams(mesh.client, 9, tokens=200) as load:
            await asyncio.sleep(2)
            proxy.faults = Faults(rate=8000)
            await asyncio.sleep(ground.seconds(15))
            proxy.faults = Faults()
        grown = (gateway.memory_info().rss - before) / 2**20
        await mesh.healthy(within_s=30)
        text = f"{load}; slowest {max(told.seconds for told in load.done):.1f} s; gateway {grown:+.1f} MB"
        return Measured(not load.failures and grown < 50, text)


async def corrupted(ground: Ground) -> Measured:
    """TCP's checksum was right: the proxy wrote a new one. Without TLS nobody can tell a changed letter from a right
    one, nor a changed request from a wrong one; what is promised is that nothing else breaks. With TLS a changed byte
    is a lost connection, and nobody may notice."""
    plain = await _corrupted(ground, (), ())
    certificate, key, ca = _certified(ground.folder)
    own = ("--tls-cert-file", certificate, "--tls-key-file", key)
    over_tls = await _corrupted(ground, own, ("--instances-ca-file", ca, "--instances-tls-name", TLS_NAME), strict=True)
    return Measured(plain.ok and over_tls.ok, f"plaintext: {plain.text}; over TLS: {over_tls.text}")


def _certified(folder: Path) -> tuple[str, str, str]:
    """Files of a certificate for TLS_NAME, of its key, and of the authority that issued it."""
    authority = trustme.CA()
    made = authority.issue_cert(TLS_NAME)
    files = [folder / name for name in ("node.pem", "node.key", "ca.pem")]
    for file, content in zip(files, (made.cert_chain_pems[0], made.private_key_pem, authority.cert_pem), strict=True):
        content.write_to_path(file)
    return str(files[0]), str(files[1]), str(files[2])


async def _corrupted(
    ground: Ground, flags: tuple[str, ...], gateway_flags: tuple[str, ...], *, strict: bool = False
) -> Measured:
    async with proxied_fleet(ground, "--step-ms", "10", *flags, gateway_flags=gateway_flags) as (mesh, proxy):
        async with streams(mesh.client, 12, tokens=40) as load:
            await asyncio.sleep(2)
            proxy.faults = Faults(corrupt=2e-4)
            await asyncio.sleep(ground.seconds(20))
            proxy.faults = Faults()
            await mesh.healthy(within_s=30)
        async with streams(mesh.client, 12, tokens=40) as after:
            await asyncio.sleep(2)
        wrong = [error for error in load.failures if error.startswith(("wrong text", "usage says"))]
        others = [error for error in load.failures if error not in wrong]
        untyped = [error for error in others if not error.partition(":")[0].isidentifier()]
        elsewhere = sum(bool(t.error) and t.served.instance_id in ("a", "b") for t in load.done)
        alive = not any(child.ended for child in (*mesh.gateways, *mesh.llms.values()))
        text = (
            f"one byte in 5,000 changed for {ground.seconds(20):g} s: {len(load.done)} answers, {len(wrong)} with "
            f"changed text, {len(others)} with an error, {elsewhere} on other instances; all live: {alive}; afterwards "
            f"{len(after.failures)} of {len(after.done)} failed{listed(others)}"
        )
        whole = not load.failures or not strict
        return Measured(alive and whole and not untyped and not elsewhere and not after.failures, text)


async def half_open(ground: Ground) -> Measured:
    """A middlebox forgets an idle connection: the ping finds out, not the next caller."""
    async with far_fleet(ground) as (mesh, host):
        await asyncio.sleep(3)
        at = time.monotonic()
        await asyncio.to_thread(host.drop)
        noticed = await mesh.until(lambda states: states.get("far") != "healthy", 10, at)
        told = await asyncio.gather(*(ask(mesh.client, Told(3, time.monotonic())) for _ in range(12)))
        errors = [one.error for one in told if one.error]
        slowest = max(one.ttft_s for one in told)
        text = (
            f"idle, then dropped: noticed after {noticed:.2f} s; 12 requests after it: {len(errors)} errors, "
            f"slowest first token {slowest:.2f} s"
        )
        return Measured(noticed <= NOTICED_S and not errors and slowest < 1.0, text)


ROWS = (
    Row(21, "black hole both ways", "out of work within 2 s, next token within 3 s, 0 failed", black_hole, 900),
    Row(22, "one way lost", "out of work within 2 s, next token within 3 s, 0 failed", one_way, 900),
    Row(23, "every packet answered by RST", "out of work within 2 s, next token within 3 s, 0 failed", reset, 900),
    Row(24, "10 % packet loss", "no false ejection, 0 failed", loss, 1800),
    Row(25, "+200 ms, jitter 100 ms", "no false ejection, 0 failed", late, 1800),
    Row(26, "a 64 kbit/s line", "all streams whole, gateway grows by less than 50 MB", thin),
    Row(
        27,
        "corrupted bytes, plaintext and TLS",
        "plaintext: errors are resumed, retried or typed; TLS: 0 failed, 0 changed; no crash, all well afterwards",
        corrupted,
        240,
    ),
    Row(28, "half-open after NAT drop", "noticed within 2 s by ping; later requests do not feel it", half_open),
)
