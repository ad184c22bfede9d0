"""What tracing costs: three gateways alike but for their spans, in turns, before one instance that answers at once.

    make traced [ARGS="--requests 4000"]

Spans go to a collector in a process of its own. Each round asks every gateway; what is shown is the median over rounds
of each one's requests a second and of its CPU time a request, beside the gateway without spans.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from load import Ask, grpc_load

from tests.kit.children import Child, Children
from tests.kit.collector import collector

KINDS = {"off": (), "1 %": ("--otlp-ratio", "0.01"), "100 %": ("--otlp-ratio", "1")}
CLIENTS = 16


async def collect(ready: Path) -> None:
    """The collector's process; ends with SIGTERM."""
    async with collector() as sink:
        sink.keep = False  # a real one hands on what it gets
        part = ready.with_suffix(".part")
        part.write_text(json.dumps({"address": sink.address}))
        part.rename(ready)
        await asyncio.Event().wait()


def cpu_s(child: Child) -> float:
    times = psutil.Process(child.pid).cpu_times()
    return times.user + times.system


async def measure(gateways: dict[str, Child], rounds: int, requests: int) -> dict[str, tuple[float, float]]:
    """Requests a second, and CPU microseconds a request, of each."""
    rates: dict[str, list[float]] = {name: [] for name in gateways}
    costs: dict[str, list[float]] = {name: [] for name in gateways}
    for number in range(rounds + 1):
        for name, child in gateways.items():
            before = cpu_s(child)
            run = await grpc_load(str(child.told()["grpc"]), Ask("fast", 1), clients=CLIENTS, count=requests)
            if number:  # the first one warms up
                rates[name].append(run.rps)
                costs[name].append((cpu_s(child) - before) / len(run.latencies) * 1e6)
    return {name: (statistics.median(rates[name]), statistics.median(costs[name])) for name in gateways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=2000, help="of each gateway in each round")
    parser.add_argument("--ready-file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ready_file:
        asyncio.run(collect(args.ready_file))
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        children = Children(run)
        sink = Child(run, "collector", [sys.executable, "-m", "tests.bench.traced"])
        try:
            with children:
                registry = children.start("registry", "--listen", "127.0.0.1:0")
                joined = ("--registry", f"mesh://{registry.address}")
                fast = ("--engine", "scripted", "--model", "fast", "--max-running", "1024")
                children.start("llm", *fast, *joined, "--listen", "127.0.0.1:0").told()
                doors = ("--grpc", "127.0.0.1:0", "--http", "", "--explain-mib", "0", "--grace-s", "2")
                gateways = {
                    name: children.start(
                        "gateway", *doors, *joined, *(("--otlp", sink.address, *ratio) if ratio else ()), name=name
                    )
                    for name, ratio in KINDS.items()
                }
                for child in gateways.values():
                    child.told()
                found = asyncio.run(measure(gateways, args.rounds, args.requests))
        finally:
            sink.destroy()
    rate, cost = found["off"]
    print("| spans kept | requests/s | of off | gateway CPU a request | of off |\n|---|---|---|---|---|")
    for name, (rps, us) in found.items():
        print(f"| {name} | {rps:.0f} | {rps / rate:.2f} | {us:.0f} µs | {us / cost:.2f} |")


if __name__ == "__main__":
    main()
