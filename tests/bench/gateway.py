"""What the gateway costs: direct versus through it, gRPC and REST, unary and streaming, in one run on one machine.

    make bench                     about three minutes; prints a table, and writes docs/bench.md with ARGS=--write

Instances that cost nothing serve: one embeds, one chats at once, one streams in steps of 5 ms, an event a token. They,
the gateway and this client are a process each and share the cores. `gateway CPU` is the gateway process's own
user + system time, divided by requests or by streamed tokens. The longest turn of the gateway's loop is taken over
everything above it, a 5 MB body and a reply of 2,048 × 1,024 floats included (measured in services/gateway/loop.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).parent))
import decision
from load import Ask, Run, grpc_load, rest_load

ROOT = Path(__file__).resolve().parents[2]
SPANS = "## What spans cost\n"
TOKENS = 256
STEP_MS = 5.0  # of the instance that streams: one event a token, as engines do


@dataclass(frozen=True)
class Mesh:
    fast: str  # host:port of the instance that answers at once
    paced: str  # of the one with a step of STEP_MS
    wide: str  # of the one that embeds
    grpc: str
    http: str
    gateway: psutil.Process


@contextmanager
def child(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ready(path: Path, process: subprocess.Popen[bytes], log: Path) -> dict[str, object]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists():
            return json.loads(path.read_text())
        if process.poll() is not None:
            raise SystemExit(f"a process ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)
    raise SystemExit(f"not ready after 60 s:\n{log.read_text()[-2000:]}")


@contextmanager
def mesh() -> Iterator[Mesh]:
    """A registry, one scripted instance, one wide embedding instance and a gateway, on ports from the OS."""
    infermesh = (sys.executable, "-P", "-m", "infermesh.cli")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        files = {name: run / f"{name}.json" for name in ("registry", "fast", "paced", "embedding", "gateway")}
        logs = {name: run / f"{name}.log" for name in files}

        def begin(name: str, *command: str):
            return child(*command, log=logs[name])

        with begin(
            "registry", *infermesh, "registry", "--listen", "127.0.0.1:0", "--ready-file", str(files["registry"])
        ) as registry:
            url = f"mesh://{ready(files['registry'], registry, logs['registry'])['address']}"
            joined = ("--registry", url)
            llm = (*infermesh, "llm", "--engine", "scripted", "--max-running", "1024", *joined)
            fast = (*llm, "--model", "fast", "--ready-file", str(files["fast"]))
            paced = (*llm, "--model", "paced", "--step-ms", str(STEP_MS), "--ready-file", str(files["paced"]))
            wide = (sys.executable, str(ROOT / "tests/bench/wide_embedding.py"), url, str(files["embedding"]))
            gate = (*infermesh, "gateway", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *joined)
            with (
                begin("fast", *fast) as first,
                begin("paced", *paced) as second,
                begin("embedding", *wide) as embedding,
                begin("gateway", *gate, "--ready-file", str(files["gateway"])) as gateway,
            ):
                addresses = [
                    str(ready(files[name], process, logs[name])["address"])
                    for name, process in (("fast", first), ("paced", second), ("embedding", embedding))
                ]
                fronts = ready(files["gateway"], gateway, logs["gateway"])
                time.sleep(1.5)  # the gateway links to both
                yield Mesh(*addresses, str(fronts["grpc"]), f"http://{fronts['http']}", psutil.Process(gateway.pid))


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@dataclass(frozen=True)
class Row:
    name: str
    clients: int
    run: Run
    cpu_us: float | None  # of the gateway, a request or a token
    unit: str

    def cells(self) -> tuple[str, ...]:
        cpu = "" if self.cpu_us is None else f"{self.cpu_us:.0f} µs a {self.unit}"
        run = self.run
        return (
            self.name,
            str(self.clients),
            f"{run.rps:.0f}",
            f"{run.events / run.wall_s:.0f}",
            f"{run.quantile_ms(0.5):.2f}",
            f"{run.quantile_ms(0.99):.2f}",
            cpu,
        )


async def measure(fleet: Mesh, scale: float) -> list[Row]:
    rows = []
    cases = (
        ("unary (an embedding)", Ask("wide", 0), fleet.wide, ((1, 1500), (16, 6000))),
        ("chat, not streamed", Ask("fast", 1), fleet.fast, ((1, 1000), (16, 4000))),
        (f"stream of {TOKENS}", Ask("paced", TOKENS, streamed=True), fleet.paced, ((1, 8), (16, 128))),
    )
    for mode, ask, direct, shapes in cases:
        for clients, number in shapes:
            count = max(clients, int(number * scale))
            for name, front in (("direct gRPC", None), ("gateway gRPC", "grpc"), ("gateway REST", "http")):
                before = cpu_s(fleet.gateway)
                if front == "http":
                    run = await rest_load(fleet.http, ask, clients=clients, count=count)
                else:
                    run = await grpc_load(fleet.grpc if front else direct, ask, clients=clients, count=count)
                spent = (cpu_s(fleet.gateway) - before) if front else None
                cpu = None if spent is None else spent / (run.events if ask.streamed else len(run.latencies)) * 1e6
                rows.append(Row(f"{name}, {mode}", clients, run, cpu, "token" if ask.streamed else "request"))
                print("  " + " | ".join(rows[-1].cells()), file=sys.stderr, flush=True)
    return rows


async def big_ones(fleet: Mesh) -> list[str]:
    """A 5 MB body (refused: it is over the context) and a 2,048 × 1,024 float reply, as float and as base64."""
    lines = []
    async with aiohttp.ClientSession(trust_env=False) as session:
        words = "word " * (5_000_000 // 5)
        bodies = {
            "5 MB prompt": (
                "chat/completions",
                {"model": "fast", "messages": [{"role": "user", "content": words}]},
            ),
            "2,048 × 1,024 floats": ("embeddings", {"model": "wide", "input": ["x"] * 2048}),
            "the same, base64": ("embeddings", {"model": "wide", "input": ["x"] * 2048, "encoding_format": "base64"}),
        }
        for name, (path, body) in bodies.items():
            begun = time.perf_counter()
            async with session.post(f"{fleet.http}/v1/{path}", json=body) as reply:
                size = len(await reply.read())
                took = time.perf_counter() - begun
                lines.append(f"{name}: HTTP {reply.status}, {size / 1e6:.1f} MB in {took * 1000:.0f} ms")
                if path == "embeddings" and reply.status != 200:
                    raise SystemExit(f"{name}: {await reply.text()}")
    return lines


async def holds_ms(fleet: Mesh) -> tuple[float, float]:
    """Longest turn of the loop, and the same with what the machine took away."""
    async with aiohttp.ClientSession(trust_env=False) as session, session.get(f"{fleet.http}/metrics") as reply:
        text = await reply.text()
    found = [
        re.search(rf"^infermesh_gateway_loop_{name}_seconds (\S+)", text, re.MULTILINE)
        for name in ("hold_max", "hold_max_wall")
    ]
    if not all(found):
        raise SystemExit("the gateway's /metrics does not tell how long its loop was held")
    longest, wall = (float(match[1]) * 1000 for match in found if match)
    return longest, wall


async def report(scale: float) -> str:
    with mesh() as fleet:
        rows = await measure(fleet, scale)
        big = await big_ones(fleet)
        longest, wall = await holds_ms(fleet)
        memory = fleet.gateway.memory_info().rss / 2**20
    head = ("path", "clients", "requests/s", "events/s", "p50 ms", "p99 ms", "gateway CPU")
    table = [head, tuple("---" for _ in head), *(row.cells() for row in rows)]
    p50 = {(row.name, row.clients): row.run.quantile_ms(0.5) for row in rows}
    unary = "unary (an embedding)"
    added = {front: p50[f"gateway {front}, {unary}", 1] - p50[f"direct gRPC, {unary}", 1] for front in ("gRPC", "REST")}
    cpus = os.cpu_count()
    lines = [
        f"Machine: {cpus} cores, {platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}",
        "",
        *("| " + " | ".join(cells) + " |" for cells in table),
        "",
        *(f"* added p50 at one client, {front}: {ms:.2f} ms" for front, ms in added.items()),
        *(f"* {line}" for line in big),
        f"* longest turn of the gateway's loop in all of this: {longest:.1f} ms ({wall:.1f} ms on the wall clock)",
        f"* gateway's resident memory at the end: {memory:.0f} MiB",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="more or fewer requests (0.1 for a quick look)")
    parser.add_argument("--write", action="store_true", help="put the result into docs/bench.md")
    parser.add_argument("--routing", action="store_true", help="only what a routing decision takes")
    args = parser.parse_args()
    routing = decision.report()  # first: nothing else of ours runs beside it
    print(routing)
    page = ROOT / "docs/bench.md"
    if args.routing:
        rest = page.read_text().partition(decision.HEADING)[0].rstrip()
    else:
        text = asyncio.run(report(args.scale))
        print(text)
        command = f"make bench ARGS='--write{'' if args.scale == 1 else f' --scale {args.scale:g}'}'"
        rest = f"# What the gateway costs\n\n{__doc__.split(chr(10) * 2)[2].strip()}\n\nCommand: `{command}`\n\n{text}"
    if args.write:
        spans = "".join(page.read_text().partition(SPANS)[1:])  # written by `make traced`
        page.write_text(f"{rest}\n\n{routing}\n\n{spans}")


if __name__ == "__main__":
    main()
