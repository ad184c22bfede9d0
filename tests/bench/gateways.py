"""Gateways that share nothing, as processes before the same scripted engines, in turn with one alone, beside `sim`.

    make gateways TRACE=trace.jsonl     about 6 minutes (ARGS="--gateways 4 --repeats 2 --write")

The trace, its scale and the engines are those of `make peers` (tests/bench/peers.py). Requests go to the gateways in
turn, each at its own time. Every run has fresh engines with cold caches and fresh gateways.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

from services.gateway.simulator.fleet import Site
from services.gateway.simulator.metrics import summary
from services.gateway.simulator.policies import policy
from services.gateway.simulator.trace import Trace
from services.gateway.simulator.world import Conditions, simulate
from tests.bench.pages import put_section
from tests.bench.peers import CHUNK, ROUTERS, measured, site
from tests.bench.peers_run import ROOT, drive, engines, routed
from tests.bench.peers_trace import SCALE, Ask, as_trace, slice_of
from tests.kit.children import leave_nothing_when_told_to_stop

SEEDS = 6
INFERMESH = ROUTERS[0]


def foretold(trace: Trace, at: Site, gateways: int) -> list[float]:
    """Mean TTFT in `sim`, a seed each."""
    conditions = Conditions(gateways=gateways)
    runs = (simulate(trace, at, policy("infermesh"), conditions, Random(seed)) for seed in range(SEEDS))
    return [summary(run, at)["ttft_mean_s"] for run in runs]


def once(gateways: int, asks: Sequence[Ask], at: Site) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        registry, workers = stack.enter_context(engines(folder, at.endpoints, CHUNK))
        urls = []
        for number in range(gateways):
            own = folder / f"gateway-{number}"
            own.mkdir()
            urls.append(stack.enter_context(routed(own, INFERMESH, "", registry, workers)))
        return measured(asyncio.run(drive(urls, asks)), asks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="JSONL in Mooncake's form")
    parser.add_argument("--gateways", type=int, default=4)
    parser.add_argument("--every", type=int, default=16, help="keep every so-manyth conversation")
    parser.add_argument("--rate", type=float, default=16.0, help="arrivals so many times as fast, before --speedup")
    parser.add_argument("--speedup", type=float, default=2.0, help="engines and arrivals so many times as fast")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many requests")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the result into docs/crosscheck.md")
    args = parser.parse_args()
    asks = slice_of(args.trace.read_text().splitlines(), args.every, args.rate * args.speedup, args.limit)
    at = site(args.speedup)
    trace = as_trace(asks, args.trace.name)
    counts = (1, args.gateways)
    sims = {count: foretold(trace, at, count) for count in counts}
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    loads = []
    for turn in range(args.repeats):
        for count in counts if turn % 2 == 0 else counts[::-1]:
            loads.append(os.getloadavg()[0])
            run = once(count, asks, at)
            runs[count].append(run)
            print(count, {key: value if key == "faults" else round(value, 4) for key, value in run.items()}, flush=True)
    lines = [
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}; load average before the runs: {', '.join(f'{x:.1f}' for x in loads)}",
        "",
        f"{len(asks)} requests in {asks[-1].at:.0f} s (each token for {SCALE}), {args.repeats} runs each, in turns",
        "",
        "| gateways | TTFT real | p50 | cached | late p99 | idle | faults | TTFT sim (range) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count in counts:
        real, sim = runs[count], sims[count]
        found = {key: median(run[key] for run in real) for key in real[0] if key != "faults"}
        each = " ".join(f"{run['ttft_mean_s']:.2f}" for run in real)
        lines.append(
            f"| {count} | {each} s | {found['ttft_p50_s']:.3f} s "
            f"| {found['cache_hit_ratio']:.0%} | {1000 * found['late_p99']:.0f} ms | {found['idle']:.0%} "
            f"| {sum(len(run['faults']) for run in real)} "
            f"| {mean(sim):.2f} s ({min(sim):.2f}–{max(sim):.2f}) |"
        )
    ratio = mean(run["ttft_mean_s"] for run in runs[args.gateways]) / mean(run["ttft_mean_s"] for run in runs[1])
    simulated = mean(sims[args.gateways]) / mean(sims[1])
    lines += ["", f"Mean TTFT of {args.gateways} gateways over that of one: {ratio:.2f}; in `sim` {simulated:.2f}."]
    text = "\n".join(lines)
    print(text)
    if args.write:
        put_section(ROOT / "docs/crosscheck.md", "gateways", text)


if __name__ == "__main__":
    leave_nothing_when_told_to_stop()
    main()
