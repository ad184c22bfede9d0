"""Stock routers and infermesh in turn before the same scripted engines, over real sockets, beside what `sim` foretells.

    make peers TRACE=trace.jsonl     about 15 minutes (ARGS="--routers infermesh,smg:cache_aware --repeats 2 --write")

Each router comes from its package into `.venv-peers/` and runs with its documented defaults; only the policy is named.
Every run has fresh engines with cold caches. The trace is cut to every `--every`-th conversation and 1/20 of its
tokens; the engines have 1/20 of their card's tokens a second and of its KV room, and everything is `--speedup` times
as fast, arrivals included.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

from registry.endpoint import Capacity, Endpoint, Hardware, Speed
from services.gateway.simulator.fleet import Site
from services.gateway.simulator.metrics import quantile, summary
from services.gateway.simulator.policies import policy
from services.gateway.simulator.trace import Trace
from services.gateway.simulator.world import Conditions, simulate
from tests.bench.pages import put_section
from tests.bench.peers_run import MODEL, ROOT, Router, Run, drive, engines, routed
from tests.bench.peers_trace import SCALE, Ask, as_trace, slice_of
from tests.kit.children import leave_nothing_when_told_to_stop

VERSIONS = {"smg": "1.13.0", "vllm-router": "0.1.17", "sglang-router": "0.3.2"}
ROUTERS = (
    Router("infermesh", "infermesh", "infermesh"),
    Router("smg", "cache_aware", "cache_aware"),
    Router("sglang-router", "cache_aware", "cache_aware"),
    # It matches token ids only (its metric says `missing_tokens` of text), and sends all else to the fewest requests.
    Router("vllm-router", "cache_aware", "least_request"),
    Router("smg", "power_of_two", ""),  # by an expected wait from loads polled each 10 s: nothing in `sim` does so
    Router("vllm-router", "power_of_two", "power_of_two"),
    Router("smg", "round_robin", "round_robin"),
    Router("vllm-router", "round_robin", "round_robin"),
)
CHUNK = 2048 // SCALE  # prompt tokens a step
OBJECTIVE = (5.0, 200.0)  # TTFT [s], TPOT [ms]: of goodput, which is not shown
# A llama-3.1-8b as deploy/examples/unlike-cards.yaml has it: prefill tokens/s, step ms, µs a step for 1,000 resident
# tokens, KV tokens. Without the T4s: stock routers know no context ranges.
CARDS = {
    "h100": ("H100-80G", 30_000, 7, 45, 426_000),
    "l40s-0": ("L40S", 9_000, 24, 170, 186_000),
    "l40s-1": ("L40S", 9_000, 24, 170, 186_000),
}
DOUBLING, CONTEXT, MAX_RUNNING = 30_600, 131_072, 256


def site(speedup: float) -> Site:
    """The fleet at scale, for engines and `sim` alike."""
    endpoints = tuple(
        Endpoint(
            id=id,
            kind="llm",
            host="127.0.0.1",
            port=1,
            model=MODEL,
            incarnation=1,
            engine="scripted",
            hardware=Hardware(device),
            speed=Speed(
                prefill_tps=tps / SCALE * speedup,
                prefill_doubling_ctx=DOUBLING / SCALE,
                step_ms=step / speedup,
                kv_us_per_ktoken=kv_us * SCALE / speedup,
                source="declared",
            ),
            capacity=Capacity(context_max=CONTEXT // SCALE, max_running=MAX_RUNNING, kv_tokens=kv // SCALE // 16 * 16),
        )
        for id, (device, tps, step, kv_us, kv) in CARDS.items()
    )
    return Site(endpoints, {"llm": MODEL}, {}, {}, *OBJECTIVE, budget=dict.fromkeys(CARDS, CHUNK))


def foretold(trace: Trace, at: Site, name: str) -> dict[str, Any]:
    """Means of what `sim --json` tells over every order in which a router may list the instances, each with a seed of
    its own, and the range of the mean TTFT."""
    runs = []
    for seed, order in enumerate(permutations(at.endpoints)):
        ids = {endpoint.id: f"{place}-{endpoint.id}" for place, endpoint in enumerate(order)}
        listed = replace(
            at,
            endpoints=tuple(replace(endpoint, id=ids[endpoint.id]) for endpoint in order),
            budget={ids[id]: budget for id, budget in at.budget.items()},
        )
        runs.append(summary(simulate(trace, listed, policy(name), Conditions(), Random(seed)), listed))
    keys = ("ttft_mean_s", "ttft_p50_s", "tpot_p50_ms", "cache_hit_ratio")
    ttfts = [run["ttft_mean_s"] for run in runs]
    return {key: mean(run[key] for run in runs) for key in keys} | {"low": min(ttfts), "high": max(ttfts)}


def measured(run: Run, asks: Sequence[Ask]) -> dict[str, Any]:
    done = [(seen, ask) for seen, ask in zip(run.seen, asks, strict=True) if not seen.fault]
    faults = [seen.fault for seen in run.seen if seen.fault]
    if not done:
        raise SystemExit(f"nothing was answered: {faults[0]}")
    ttft = [seen.ttft for seen, _ in done]
    tpot = [1000 * (seen.e2e - seen.ttft) / (seen.tokens - 1) for seen, _ in done if seen.tokens > 1]
    return {
        "ttft_mean_s": mean(ttft),
        "ttft_p50_s": median(ttft),
        "tpot_p50_ms": median(tpot),
        "cache_hit_ratio": sum(seen.cached for seen, _ in done) / sum(ask.prompt for _, ask in done),
        "faults": faults,
        "idle": mean(run.idle),
        "idle_least": min(run.idle),
        "late_p99": quantile([seen.late for seen in run.seen], 0.99),
    }


def once(router: Router, asks: Sequence[Ask], at: Site) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        with engines(Path(folder), at.endpoints, CHUNK) as (registry, workers):
            version = VERSIONS.get(router.package, "")
            with routed(Path(folder), router, version, registry, workers) as url:
                return measured(asyncio.run(drive([url], asks)), asks)


def table(routers: Sequence[Router], sims: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> str:
    head = ("router", "in sim", "TTFT sim (range)", "TTFT real", "real / sim", "p50 sim", "real")
    head += ("TPOT p50 sim", "real", "cached sim", "real", "idle", "faults")
    lines = [head, tuple("---" for _ in head)]
    for router in routers:
        sim, real = sims.get(router.simulated), runs[router.name]
        found = {key: median(run[key] for run in real) for key in real[0] if key != "faults"}

        def both(key: str, shape: str, sim: Any = sim, found: dict[str, float] = found) -> tuple[str, str]:
            return shape.format(sim[key]) if sim else "-", shape.format(found[key])

        name = (
            f"{router.package} {VERSIONS[router.package]} {router.policy}"
            if router.package in VERSIONS
            else router.name
        )
        lines.append(
            (
                name,
                router.simulated or "-",
                f"{sim['ttft_mean_s']:.2f} s ({sim['low']:.2f}–{sim['high']:.2f})" if sim else "-",
                " ".join(f"{run['ttft_mean_s']:.2f}" for run in real) + " s",
                f"{found['ttft_mean_s'] / sim['ttft_mean_s']:.2f}" if sim else "-",
                *both("ttft_p50_s", "{:.2f} s"),
                *both("tpot_p50_ms", "{:.0f} ms"),
                *both("cache_hit_ratio", "{:.0%}"),
                f"{found['idle']:.0%}",
                str(sum(len(run["faults"]) for run in real)),
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="JSONL in Mooncake's form")
    parser.add_argument("--every", type=int, default=16, help="keep every so-manyth conversation")
    parser.add_argument("--rate", type=float, default=10.0, help="arrivals so many times as fast, before --speedup")
    parser.add_argument("--speedup", type=float, default=2.0, help="engines and arrivals so many times as fast")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many requests")
    parser.add_argument("--routers", default="", help="of " + ",".join(f"{r.package}:{r.policy}" for r in ROUTERS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the result into docs/crosscheck.md")
    args = parser.parse_args()
    names = args.routers.split(",") if args.routers else []
    routers = [router for router in ROUTERS if not names or f"{router.package}:{router.policy}" in names]
    if not routers or len(names) > len(routers):
        parser.error(f"--routers {args.routers}: see --help")
    asks = slice_of(args.trace.read_text().splitlines(), args.every, args.rate * args.speedup, args.limit)
    at = site(args.speedup)
    trace = as_trace(asks, args.trace.name)
    sims = {name: foretold(trace, at, name) for name in dict.fromkeys(r.simulated for r in routers) if name}
    for name, sim in sims.items():
        print(f"sim {name}: mean TTFT {sim['ttft_mean_s']:.3f} s, {sim['low']:.3f} to {sim['high']:.3f}", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for router in routers:
            run = once(router, asks, at)
            runs.setdefault(router.name, []).append(run)
            shown = {key: round(value, 4) for key, value in run.items() if key != "faults"}
            print(f"{router.name}: {shown} faults {run['faults'][:2]}", flush=True)
    prompt = mean(ask.prompt for ask in asks)
    lines = [
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}",
        "",
        f"{len(asks)} requests in {asks[-1].at:.0f} s, {prompt:.0f} tokens a prompt in the mean (each for {SCALE})",
        "",
        table(routers, sims, runs),
    ]
    text = "\n".join(lines)
    print(text)
    if args.write:
        put_section(ROOT / "docs/crosscheck.md", "peers", text)


if __name__ == "__main__":
    leave_nothing_when_told_to_stop()
    main()
