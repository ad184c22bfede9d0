"""Rows 44, 45, 47, 49, 50: the machine under the gateway: clocks, descriptors, CPU, names, the collector."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import psutil

from infermesh.client import AsyncClient
from tests.fault.fleet import fleet
from tests.fault.load import MODEL, Told, ask, quantile, streams
from tests.fault.matrix import Ground, Measured, Row, Skipped
from tests.fault.rest import chat, post, session
from tests.kit import namespace
from tests.kit.fault_proxy import FaultProxy, Faults
from tests.kit.namespace import Host

FAKETIME = [Path(f"/usr/lib/{machine}-linux-gnu/faketime/libfaketimeMT.so.1") for machine in ("x86_64", "aarch64")]


async def clock_jumps(ground: Ground) -> Measured:
    """The wall clock of the gateway and of an instance goes an hour ahead, then two back."""
    library = next((path for path in FAKETIME if path.exists()), None)
    if library is None:
        raise Skipped("libfaketime is not installed (apt-get install faketime)")
    offset = ground.folder / "offset"
    offset.write_text("+0")
    env = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    async with fleet(ground.folder, "a") as mesh:
        mesh.add_llm("b", env=env)
        mesh.add_gateway(env=env)
        await mesh.started(mesh.gateways[1])
        client = await mesh.dial(mesh.gateways[1].told()["grpc"])
        await mesh.healthy()
        shifts, created = 0.0, []
        async with streams(client, 8, tokens=30) as load:
            for jump in ("+3600", "-3600", "+0"):
                await asyncio.sleep(2)
                offset.write_text(jump)
                for _ in range(30):
                    states = await mesh.states(client)
                    shifts += any(states.get(id) != "healthy" for id in ("a", "b"))
                    await asyncio.sleep(0.1)
                created.append(await _dated(client, "b"))
        jumped = created == [60, -60, 0]
        text = (
            f"+1 h, -1 h, back: {shifts:g} times one was out of work; b's answers date themselves {created} min; {load}"
        )
        return Measured(not shifts and not load.failures and jumped, text)


async def _dated(client: AsyncClient, instance: str) -> int:
    """By how many minutes that instance's answers say another time than ours: the proof that its clock did jump."""
    async with asyncio.timeout(20):
        while True:
            answer = await client.chat("hello", model=MODEL, max_tokens=1)
            if answer.served.instance_id == instance:
                return round((answer.created - time.time()) / 60)


async def no_descriptors(ground: Ground) -> Measured:
    """A gateway that may open 256 files, and 600 connections that stay open: REST alone, then both doors."""
    async with fleet(ground.folder, "a", "b") as mesh:
        gateway = mesh.add_gateway(prefix=("prlimit", "--nofile=256:256"))
        await mesh.started(gateway)
        doors = [str(gateway.told()[door]) for door in ("http", "grpc")]
        client = await mesh.dial(doors[1])
        assert await _served(client)
        told = []
        for name, addresses in (("REST", doors[:1]), ("both doors", doors)):
            with contextlib.ExitStack() as held:
                _flood(held, addresses, 600)
                await asyncio.sleep(2)
                files = psutil.Process(gateway.pid).num_fds()
                answers = [await ask(client, Told(5, time.monotonic()), timeout=5) for _ in range(3)]
            errors = [answer.error for answer in answers if answer.error]
            told.append((name, files, len(errors), max(answer.seconds for answer in answers)))
        freed = time.monotonic()
        recovered = float("inf")
        async with session() as rest:
            while time.monotonic() - freed < 30:
                if (await post(rest, doors[0], chat(), timeout_s=3)).status == 200:
                    recovered = time.monotonic() - freed
                    break
                await asyncio.sleep(0.1)
        each = "; ".join(f"{name}: {files} of 256 open, {bad} of 3 fail, {s:.2f} s" for name, files, bad, s in told)
        text = (
            f"who has a connection: {each}; gateway lives: {not gateway.ended}; new ones served {recovered:.1f} s "
            f"after the flood left; {len(gateway.text().splitlines())} log lines"
        )
        fine = not gateway.ended and not any(bad for _, _, bad, _ in told) and recovered < 15
        return Measured(fine and len(gateway.text().splitlines()) < 2000, text)


def _flood(held: contextlib.ExitStack, addresses: list[str], count: int) -> None:
    """Connections that say nothing, as many at each address in turn."""
    for number in range(count):
        one = held.enter_context(socket.socket())
        one.setblocking(False)
        host, _, port = addresses[number % len(addresses)].rpartition(":")
        with contextlib.suppress(OSError):
            one.connect_ex((host, int(port)))


async def disk_full(ground: Ground) -> Measured:
    """The disk that a gateway keeps its past and its bans on has no byte left."""
    disk = ground.folder / "disk"
    disk.mkdir()
    mounted = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk))
    if await mounted.wait():
        raise Skipped("a small disk cannot be mounted here")
    try:
        kept = ("--explain-dir", str(disk / "past"), "--bans-file", str(disk / "bans.json"))
        async with fleet(ground.folder, "a", "b", gateway_flags=kept) as mesh:
            async with streams(mesh.client, 8, tokens=10) as load:
                await asyncio.sleep(1)
                with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
                await asyncio.sleep(ground.seconds(10))
                await mesh.client.ban("a")
                took = await mesh.until(lambda states: states.get("a") == "banned", 5)
                await asyncio.sleep(1)
            lines = len(mesh.gateways[0].text().splitlines())
            alive = not mesh.gateways[0].ended
    finally:
        left = await asyncio.create_subprocess_exec("umount", "-l", str(disk))
        await left.wait()
    text = f"full for {ground.seconds(10):g} s: {load}; a ban in force after {took:.2f} s; {lines} log lines"
    return Measured(alive and not load.failures and took < 5 and lines < 200, text)


async def no_cpu(ground: Ground) -> Measured:
    """Twice as many busy loops as cores beside everything."""
    async with fleet(ground.folder, "a", "b", "c") as mesh:
        burners = [
            await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
            for _ in range(2 * (os.cpu_count() or 1))
        ]
        try:
            before = (await mesh.metrics()).get("infermesh_gateway_ejections_total", 0)
            bad, until = 0, time.monotonic() + ground.seconds(40)
            async with streams(mesh.client, 8, tokens=30) as load:
                while time.monotonic() < until:
                    bad += any(state != "healthy" for state in (await mesh.states()).values())
                    await asyncio.sleep(0.2)
            ejected = (await mesh.metrics()).get("infermesh_gateway_ejections_total", 0) - before
        finally:
            for burner in burners:
                burner.kill()
                await burner.wait()
        text = (
            f"{len(burners)} busy loops, {ground.seconds(40):g} s: {ejected:g} ejections, {bad} times seen out; {load}"
        )
        return Measured(not ejected and not bad and not load.failures, text)


async def no_names(ground: Ground) -> Measured:
    """The gateway knows an instance by name, and then names cannot be resolved any more."""
    if why := namespace.why_not():
        raise Skipped(why)
    with Host() as host:
        host.etc.mkdir(parents=True)
        (host.etc / "hosts").write_text(f"127.0.0.1 localhost\n{host.here} llm-by-name.example\n")
        (host.etc / "resolv.conf").write_text(f"nameserver {host.there}\noptions timeout:1 attempts:1\n")
        async with fleet(ground.folder, host=host.here) as mesh:
            port = _free_port(host.here)
            mesh.add_llm("a", "--listen", f"{host.here}:{port}", "--advertise", f"llm-by-name.example:{port}")
            doors = ("--grpc", f"{host.there}:0", "--http", f"{host.there}:0")
            gateway = mesh.add_gateway(*doors, prefix=host.enter)
            await mesh.started(gateway, mesh.llms["a"])
            client = await mesh.dial(gateway.told()["grpc"])
            first = await _served(client)
            async with streams(client, 4, tokens=20) as load:
                await asyncio.sleep(1)
                (host.etc / "hosts").write_text("127.0.0.1 localhost\n")
                bad, until = 0, time.monotonic() + ground.seconds(20)
                while time.monotonic() < until:
                    bad += (await mesh.states(client)).get("a") != "healthy"
                    await asyncio.sleep(0.2)
            text = f"served by name: {first}; {ground.seconds(20):g} s without names: {bad} times out of work; {load}"
            return Measured(first and not bad and not load.failures, text)


async def _served(client: object) -> bool:
    for _ in range(100):
        if (await ask(client, Told(1, time.monotonic()))).ok:  # type: ignore[arg-type]
            return True
        await asyncio.sleep(0.1)
    return False


def _free_port(host: str) -> int:
    with socket.socket() as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


async def no_collector(ground: Ground) -> Measured:
    """The OTLP endpoint is closed, then swallows everything without a word. Both beside a gateway that has none."""
    async with fleet(ground.folder, "a", "b", flags=("--step-ms", "5")) as mesh, FaultProxy() as hole:
        hole.target = ("127.0.0.1", _free_port("127.0.0.1"))
        hole.faults = Faults(drop=True)
        closed = f"127.0.0.1:{_free_port('127.0.0.1')}"
        listener = await asyncio.start_server(_swallow, "127.0.0.1", 0)
        mute = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        for otlp in (closed, mute):
            mesh.add_gateway("--otlp", f"http://{otlp}")
        await mesh.started(*mesh.gateways)
        clients = {
            name: await mesh.dial(child.told()["grpc"])
            for name, child in zip(("none", "closed", "mute"), mesh.gateways, strict=True)
        }
        took: dict[str, list[float]] = {name: [] for name in clients}
        errors = []
        async with listener:
            until = time.monotonic() + ground.seconds(20)
            while time.monotonic() < until:  # in turn, so that the machine's moods hit all alike
                for name, client in clients.items():
                    told = await ask(client, Told(5, time.monotonic()))
                    took[name].append(told.seconds)
                    errors += [told.error] if told.error else []
            begun = time.monotonic()
            for child in mesh.gateways[1:]:
                child.ask()
            codes = [await asyncio.to_thread(child.popen.wait, 20) for child in mesh.gateways[1:]]
            left = time.monotonic() - begun
        middle = {name: quantile(values, 0.5) * 1000 for name, values in took.items()}
        text = (
            f"median of 5 tokens: {', '.join(f'{name} {ms:.0f} ms' for name, ms in middle.items())}; "
            f"{len(errors)} errors; both left in {left:.1f} s, exit codes {codes}"
        )
        near = all(ms <= 1.25 * middle["none"] + 5 for ms in middle.values())
        return Measured(near and not errors and codes == [0, 0] and left < 15, text)


async def _swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass
    writer.close()


ROWS = (
    Row(44, "wall clock jumps by an hour, both ways", "no effect: 0 failed, nobody out of work", clock_jumps),
    Row(45, "no file descriptors left", "no crash, who has a connection is served, recovers by itself", no_descriptors),
    Row(46, "disk full", "what is kept is lost, all else goes on: 0 failed", disk_full),
    Row(47, "CPU oversubscribed twofold", "no false ejection, 0 failed", no_cpu, 900),
    Row(49, "names cannot be resolved any more", "who is known stays in work, 0 failed", no_names),
    Row(50, "OTLP collector closed; mute", "no effect on latency or leaving, 0 errors", no_collector),
)
