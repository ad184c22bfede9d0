"""Microseconds a routing decision takes, at 10, 100 and 1,000 instances, with a 16k-token prompt.

    python -m tests.bench.pick [--json]

Each decision hashes a prompt of 64 KiB into its chain, matches the chain in an index that holds it on a few instances,
chooses and reserves: `whole`. `hash` is the first part of it. What follows a decision and nobody waits for is `after`:
first token, release, what is learned, and the entry into the index. Time is this thread's CPU time, at real-time
priority where that is allowed: neighbours on the machine empty the caches too. The router is deterministic, so each of
five runs makes the same decisions: p50 and p99 are those of the quietest run, and `whole_p99_quiet_us` that of each
decision's quietest time, which is what the dearest decisions cost by themselves.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress

from infermesh.v1 import language_model_pb2 as lm
from registry.endpoint import Capacity, Endpoint, Hardware, Speed
from services.chassis.prefix import prefix
from services.gateway.routing.decision import Dispatch
from services.gateway.routing.facts import End, Facts, Member, Outcome
from services.gateway.routing.router import Router

PROMPT_BYTES = 64 << 10
RUNS = 5
WARM_UP = 200  # decisions until every document is known
LIMIT_US = {10: 100.0, 1000: 800.0}


def fleet(count: int) -> Router:
    endpoints = [
        Endpoint(
            id=f"instance-{i:04}",
            kind="llm",
            host="10.0.0.1",
            port=9000,
            model="m",
            incarnation=1,
            hardware=Hardware(device=("A800-80G", "H20-96G", "L40S")[i % 3]),
            speed=Speed(prefill_tps=20_000.0 + 500 * (i % 7), prefill_doubling_ctx=55_000, step_ms=10 + i % 5),
            capacity=Capacity(context_max=32_768, max_running=256, kv_tokens=400_000),
        )
        for i in range(count)
    ]
    router = Router(0.0)
    router.update([Member(endpoint) for endpoint in endpoints], 0.0)
    for endpoint in endpoints:
        router.linked(endpoint.id, 1, 0.0)
    return router


def request(number: int) -> lm.ChatRequest:
    """Nine in ten begin like one of 20 documents."""
    document = f"document {number % 20} " if number % 10 else f"only {number} "
    text = (document * (PROMPT_BYTES // len(document) + 1))[: PROMPT_BYTES - 64] + f"question {number}"
    return lm.ChatRequest(model="m", messages=[lm.Message(role=lm.ROLE_USER, content=text)])


def measure(count: int, rounds: int = 3000) -> dict[str, list[float]]:
    """Microseconds of each decision after the warm-up."""
    router = fleet(count)
    requests = [request(number) for number in range(200)]
    taken: dict[str, list[float]] = {"whole": [], "hash": [], "after": []}
    clock = time.thread_time  # what other processes take away is not the decision's cost
    done = Outcome(End.DONE, prompt_tokens=16_000, completion_tokens=100)
    gc.collect()
    gc.freeze()
    for i in range(rounds):
        now = 10.0 + i * 0.2
        begun = clock()
        begins = prefix(requests[i % len(requests)], b"salt", 0)
        between = clock()
        facts = Facts(
            "llm",
            "m",
            prompt_bytes=PROMPT_BYTES,
            max_tokens=100,
            since=now,
            chain=begins.chain,
            chain_share=begins.share,
        )
        decision = router.pick(facts, now, 0.5)
        end = clock()
        if isinstance(decision, Dispatch):
            router.started(decision.lease, now)
            router.release(decision.lease, done, now)
        taken["after"].append((clock() - end) * 1e6)
        taken["whole"].append((end - begun) * 1e6)
        taken["hash"].append((between - begun) * 1e6)
    return {name: found[WARM_UP:] for name, found in taken.items()}


def quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[int(len(ordered) * share)], 1)


def quietest(count: int) -> dict[str, float]:
    runs = [measure(count) for _ in range(RUNS)]
    said = {
        f"{name}_{label}_us": min(quantile(run[name], share) for run in runs)
        for name in runs[0]
        for label, share in (("p50", 0.5), ("p99", 0.99))
    }
    each = (min(times) for times in zip(*(run["whole"] for run in runs), strict=True))
    return said | {"whole_p99_quiet_us": quantile(each, 0.99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    found = {str(count): quietest(count) for count in (10, 100, 1000)}
    if parser.parse_args().json:
        print(json.dumps(found))
        return
    for count, said in found.items():
        limit = LIMIT_US.get(int(count))
        print(f"{count:>5} instances: {said}" + (f"  limit of whole_p99: {limit:g}" if limit else ""))


if __name__ == "__main__":
    main()
