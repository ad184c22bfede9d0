"""Two real vLLM instances, one slowed to half, behind the gateway: who is sent where, and what `sim` foretold of it.

    make vllms     about five minutes on two cores (ARGS="--write" puts the result into docs/crosscheck.md)

Eight prefixes of 1,792 tokens, twelve requests each with 32 tokens of their own, shuffled, as fast as `--rps`. The fast
instance has KV room for six prefixes, the slow one for three, so that both together hold all eight and neither does.
The same requests then go to the two in turn, without a gateway (other prefixes, so that nothing is cached yet).
An engine alone is calibrated first, unhindered and halved; the speeds so found are what the two register, and what
`sim` takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

from registry.endpoint import Capacity, Endpoint, Hardware
from services.gateway.simulator.fleet import Site
from services.gateway.simulator.policies import policy
from services.gateway.simulator.trace import Request, Trace, chain_of
from services.gateway.simulator.world import Conditions, simulate
from tests.bench.pages import put_section
from tests.bench.peers_run import ROOT
from tests.bench.two_vllms_run import (
    BLOCK,
    BUDGET,
    CONTEXT,
    MODEL,
    SIZES,
    Ask,
    Card,
    Measured,
    Run,
    Seen,
    calibrated,
    drive,
    instance,
    mesh,
    write_model,
)
from tests.kit.children import leave_nothing_when_told_to_stop

PREFIXES, TIMES = 8, 12
PREFIX, OWN, OUTPUT = 56 * BLOCK, BLOCK, 4  # tokens
ROOM = 56  # blocks of a prefix
HALVED = (1.6, 2.6)  # times as long as unhindered: what passes for half speed
SPARE = 40  # blocks for what requests have of their own
CARDS = (Card("fast", 0, 6 * ROOM + SPARE), Card("slow", 1, 3 * ROOM + SPARE, halved=True))


def workload(seed: int, rps: float) -> list[Ask]:
    """`seed` also makes the prefixes: two seeds share none."""
    random = Random(seed)
    prefixes = [[random.randrange(3, 880) for _ in range(PREFIX)] for _ in range(PREFIXES)]
    order = [number % PREFIXES for number in range(PREFIXES * TIMES)]
    random.shuffle(order)
    asks, at = [], 0.0
    for number in order:
        own = [random.randrange(3, 880) for _ in range(OWN)]
        asks.append(Ask(at, number, tuple(prefixes[number] + own), OUTPUT))
        at += random.expovariate(rps)
    return asks


def as_trace(asks: Sequence[Ask]) -> Trace:
    requests = []
    for index, ask in enumerate(asks):
        blocks = [ask.prefix * 1000 + place for place in range(PREFIX // BLOCK)] + [1_000_000 + index]
        prompt = len(ask.tokens)
        requests.append(Request(index, ask.at, prompt, ask.output, chain_of(blocks, ""), max_tokens=ask.output))
    return Trace("prefix repetition", tuple(requests), BLOCK)


def site(found: dict[str, Measured]) -> Site:
    endpoints = tuple(
        Endpoint(
            id=card.id,
            kind="llm",
            host="127.0.0.1",
            port=1,
            model=MODEL,
            incarnation=1,
            engine="vllm",
            hardware=Hardware("cpu"),
            speed=found[card.id].speed,
            capacity=Capacity(context_max=CONTEXT, kv_tokens=card.blocks * BLOCK, kv_block=BLOCK),
        )
        for card in CARDS
    )
    return Site(endpoints, {"llm": MODEL}, {}, {}, 5.0, 200.0, budget={card.id: BUDGET for card in CARDS})


def foretold(asks: Sequence[Ask], found: dict[str, Measured], name: str) -> list[Seen]:
    """What `sim` says of each request. Half of the fixed time is each way of the wire."""
    conditions = Conditions(network_s=mean(one.fixed_s for one in found.values()) / 2)
    run = simulate(as_trace(asks), site(found), policy(name), conditions, Random(0))
    return [Seen(job.first - job.request.arrival, job.cached, job.instance) for job in run.jobs]


def numbers(asks: Sequence[Ask], seen: Sequence[Seen]) -> dict[str, float]:
    """`repeat_cached`: of the prompt tokens of all requests whose prefix was asked for before, those that the engine
    found in its cache. `slow_cold`: of the prompt tokens computed, those on the slow instance."""
    known: set[int] = set()
    repeats, firsts = [], []
    for ask, one in zip(asks, seen, strict=True):
        (repeats if ask.prefix in known else firsts).append((ask, one))
        known.add(ask.prefix)
    computed = {card.id: 0 for card in CARDS}
    for ask, one in zip(asks, seen, strict=True):
        computed[one.instance] += len(ask.tokens) - one.cached
    return {
        "repeat_cached": sum(one.cached for _, one in repeats) / sum(len(ask.tokens) for ask, _ in repeats),
        "slow_cold": computed["slow"] / sum(computed.values()),
        "slow_firsts": sum(one.instance == "slow" for _, one in firsts),
        "slow_requests": sum(one.instance == "slow" for one in seen),
        "ttft": mean(one.ttft for one in seen),
        "ttft_first": mean(one.ttft for _, one in firsts),
        "ttft_repeat": mean(one.ttft for _, one in repeats),
    }


def row(name: str, found: dict[str, float]) -> str:
    cells = (
        name,
        f"{found['repeat_cached']:.1%}",
        f"{found['slow_cold']:.0%}",
        f"{found['slow_firsts']:.0f} of {PREFIXES}",
        f"{found['slow_requests']:.0f}",
        *(f"{found[key]:.2f} s" for key in ("ttft", "ttft_first", "ttft_repeat")),
    )
    return "| " + " | ".join(cells) + " |"


async def calibrate(folder: Path, model: Path) -> dict[str, Measured]:
    """One engine alone, unhindered and halved: the cards differ in nothing else."""
    with instance(folder, model, replace(CARDS[0], id="alone")) as child:
        fast, slow = await calibrated(await asyncio.to_thread(lambda: child.address), child.pid)
    print(fast, slow, sep="\n", flush=True)
    ratio = slow.prefill_s[-1] / fast.prefill_s[-1]
    if not HALVED[0] <= ratio <= HALVED[1]:
        raise SystemExit(
            f"stopped for half of the time, the engine takes {ratio:.2f} times as long as otherwise, not about twice: "
            "the machine is too busy with other work for this to mean anything"
        )
    return {"fast": fast, "slow": slow}


async def runs(rps: float, count: int) -> tuple[dict[str, Measured], list[tuple[list[Ask], Run, list[Ask], Run]]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = await asyncio.to_thread(write_model, folder / "model")
        found = await calibrate(folder, model)
        pairs = []
        with mesh(folder, model, CARDS, {id: one.speed for id, one in found.items()}) as (gateway, addresses):
            await asyncio.to_thread(time.sleep, 2.0)  # the gateway links to both
            for number in range(count):
                routed, turned = workload(2 * number, rps), workload(2 * number + 1, rps)
                through = await drive(routed, [gateway])
                print("infermesh", numbers(routed, through.seen), flush=True)
                direct = await drive(turned, list(addresses.values()))
                print("in turn", numbers(turned, direct.seen), flush=True)
                pairs.append((routed, through, turned, direct))
    return found, pairs


def report(found: dict[str, Measured], pairs: Sequence[tuple[list[Ask], Run, list[Ask], Run]], rps: float) -> str:
    lines = [
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, {rps:g} requests/s",
        "",
        "| calibrated | " + " | ".join(f"TTFT, {size} tokens" for size in SIZES) + " | prefill tokens/s | doubles at | "
        "step | fixed |",
        "|" + "---|" * (len(SIZES) + 5),
    ]
    for id, one in found.items():
        times = " | ".join(f"{seconds:.3f} s" for seconds in one.prefill_s)
        speed: Any = one.speed
        fit = f"{speed.prefill_tps:.0f} | {speed.prefill_doubling_ctx:.0f} | {speed.step_ms:.1f} ms"
        lines.append(f"| {id} | {times} | {fit} | {one.fixed_s * 1000:.0f} ms |")
    head = ("run", "repeat tokens from cache", "computed on the slow one", "first sights there", "requests there")
    head += ("TTFT", "of first sights", "of repeats")
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for routed, through, turned, direct in pairs:
        for name, asks, run, simulated in (
            ("infermesh", routed, through, "infermesh"),
            ("in turn", turned, direct, "round_robin"),
        ):
            real, sim = numbers(asks, run.seen), numbers(asks, foretold(asks, found, simulated))
            idle = mean(run.idle) if run.idle else 0.0
            lines.append(row(f"{name}, real ({idle:.0%} of the machine idle)", real))
            lines.append(row(f"{name}, sim (real / sim {real['ttft'] / sim['ttft']:.2f})", sim))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rps", type=float, default=6.0, help="requests a second, in the mean")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the result into docs/crosscheck.md")
    args = parser.parse_args()
    text = report(*asyncio.run(runs(args.rps, args.repeats)), args.rps)
    print(text)
    if args.write:
        put_section(ROOT / "docs/crosscheck.md", "vllms", text)


if __name__ == "__main__":
    leave_nothing_when_told_to_stop()
    main()
