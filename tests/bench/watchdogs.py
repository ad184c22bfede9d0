"""What the watchdogs cost: milliseconds of CPU a tick, with so many streams in flight.

python -m tests.bench.watchdogs
"""

from __future__ import annotations

import gc
import time

from registry.endpoint import Capacity
from services.gateway.routing.decision import Dispatch
from services.gateway.routing.facts import LoadReport
from tests.kit.routing import endpoint, facts, router

STREAMS, TICK_S, TICKS = 5000, 0.05, 400


def ticks(streams: int, instances: int, *, moving: bool) -> list[float]:
    """Milliseconds of CPU of each tick. `moving`: every stream gives a token between two; else all are silent."""
    made = router(*(endpoint(f"e{i}", tps=1e9, capacity=Capacity(max_running=streams)) for i in range(instances)))
    leases, now = [], 100.0
    for number in range(streams):
        decision = made.pick(facts(tenant=f"t{number % 20}", since=now), now, number / streams)
        assert isinstance(decision, Dispatch)
        made.started(decision.lease, now)
        made.heeding(decision.lease)
        leases.append(decision.lease)
    gc.freeze()
    gc.disable()
    took = []
    for step in range(TICKS):
        now += TICK_S
        if step % 20 == 0:
            for i in range(instances):
                made.report(f"e{i}", 1, LoadReport(running=streams // instances, waiting=0, steps=step), now)
        if moving:
            for lease in leases:
                made.progressed(lease, 1)
                made.heeding(lease)
        begun = time.thread_time()
        made.tick(now)
        took.append((time.thread_time() - begun) * 1000)
    return took


def main() -> None:
    for instances in (1, 10, 100):
        for moving in (True, False):
            took = sorted(ticks(STREAMS, instances, moving=moving))
            kind = "moving" if moving else "silent"
            print(
                f"{STREAMS} streams on {instances:>3} instances, {kind}: p50 {took[len(took) // 2]:.3f} ms a tick, "
                f"p99 {took[int(len(took) * 0.99)]:.3f} ms, longest {took[-1]:.3f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
