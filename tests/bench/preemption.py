"""What engines could gain that put a long prompt aside for a shorter one: an estimate, not a run of anything there is.

    python -m tests.bench.preemption --trace mooncake.jsonl [--limit 3000]       a minute of one core

The router's own run in `sim` says which prompts the hosts of the long-context tier computed, and how much of each.
The same prompts at the same times are then put in order again on as many servers that know every length beforehand:
shortest first, and shortest remaining first with preemption at no cost (SRPT: Schrage, Operations Research 16, 1968).
Steps carry decoding requests too; that is taken as `BESIDE` more of each prompt's time.
"""

from __future__ import annotations

import argparse
from heapq import heapify, heappop, heappush
from pathlib import Path
from random import Random

from deploy.fleet import parse_fleet
from services.gateway.simulator.engine import LlmEngine
from services.gateway.simulator.fleet import site_of
from services.gateway.simulator.ours import PATIENT
from services.gateway.simulator.policies import policy
from services.gateway.simulator.trace import parse_trace
from services.gateway.simulator.world import Conditions, simulate

FLEET = Path(__file__).resolve().parents[2] / "deploy/examples/mixed-72b.yaml"
RATES = (0.06816, 0.09542, 0.1227, 0.15)  # 0.5, 0.7, 0.9 and 1.1 of capacity in docs/routing.md
BESIDE = 1.1
TARGET_S = 10.0


def waits(prompts: list[tuple[float, float]], servers: int, *, preempt: bool) -> list[float]:
    """Seconds from arrival to the end, of (arrival, seconds of work), sorted by arrival."""
    now, found, waiting = 0.0, [], []
    running: list[list[float]] = []  # [seconds left, arrival]
    coming = list(reversed(prompts))
    while coming or waiting or running:
        end = min((now + left for left, _ in running), default=float("inf"))
        then = min(end, coming[-1][0] if coming else float("inf"))
        for one in running:
            one[0] -= then - now
        now = then
        found += [now - arrival for left, arrival in running if left <= 1e-9]
        running = [one for one in running if one[0] > 1e-9]
        while coming and coming[-1][0] <= now:
            arrival, work = coming.pop()
            heappush(waiting, [work, arrival])
        if preempt:
            waiting += running
            running = []
            heapify(waiting)
        while waiting and len(running) < servers:
            running.append(heappop(waiting))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=3000)
    args = parser.parse_args()
    site = site_of(parse_fleet(FLEET.read_text(), FLEET.name))
    tier = {endpoint.id for endpoint in site.endpoints if endpoint.tier == "long-context"}
    with args.trace.open() as lines:
        trace = parse_trace(lines, args.trace.name).first(args.limit)
    for rate in RATES:
        run = simulate(trace.at_rate(rate), site, policy("infermesh", PATIENT), Conditions(), Random(0))
        engines = {engine.id: engine for engine in run.engines if isinstance(engine, LlmEngine)}
        served = [job for job in run.jobs if not job.shed]
        late = {
            tier_only: sum(
                job.first - job.request.arrival > TARGET_S for job in served if (job.instance in tier) is tier_only
            )
            for tier_only in (True, False)
        }
        prompts = sorted(
            (
                job.request.arrival,
                BESIDE * engines[job.instance].pace.prefill_s(job.request.prompt - job.cached, job.cached),
            )
            for job in served
            if job.instance in tier
        )
        said = [f"rate {rate:g}: of {len(served)}, {late[True] + late[False]} later than {TARGET_S:g} s"]
        for name, preempt in (("shortest first", False), ("shortest remaining first", True)):
            again = waits(prompts, len(tier), preempt=preempt)
            count = sum(wait > TARGET_S for wait in again) + late[False]
            said.append(f"{name} {count}, mean {sum(again) / len(again):.2f} s")
        alone = sum(work / BESIDE > TARGET_S for _, work in prompts)
        print("; ".join(said) + f"; {alone} prompts last longer than that by themselves", flush=True)


if __name__ == "__main__":
    main()
