"""What chat beside long documents gains where shorter prompts overtake longer ones in the instances: in virtual time.

    python -m tests.bench.preemption [--write]       half a minute of one core

Chat of 700 tokens (spread 0.8), 2 a second an instance, beside documents of 60,000 tokens, one in 100 s: on one
instance and on two of the speed of 8 x H20 with a 72B model. `infermesh_fcfs` is the same router before instances that
compute prompts first come first served (`--no-preempt`), `round_robin` sends in turn and lets all wait in the instance.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean

from deploy.fleet import parse_fleet
from services.gateway.simulator.arrivals import generate, parse_spec
from services.gateway.simulator.fleet import site_of
from services.gateway.simulator.job import Job
from services.gateway.simulator.policies import policy
from services.gateway.simulator.world import Conditions, simulate

DECISION = Path(__file__).resolve().parents[2] / "docs/decisions/0041-preemption.md"
MARK = "| instances | policy |"
SPEED = "speed: {prefill_tps: 4000, prefill_doubling_ctx: 55000, step_ms: 10, kv_us_per_ktoken: 12}"
CHAT_RPS, DOCUMENT_RPS, SECONDS = 2, 0.01, 1200
LONG = 16_000
HEAD = (MARK + " chat: mean | p90 | p99 | tpot p50 | documents: mean | max | put aside |", "|" + " --- |" * 9)


def fleet(instances: int) -> str:
    each = "engine: scripted, kv_tokens: 900000, max_running: 256"
    lines = "".join(f"  - {{id: e{i}, model: m, {each}, {SPEED}}}\n" for i in range(instances))
    return f"version: 1\nmodels: [{{id: m, kind: llm}}]\ninstances:\n{lines}"


def row(instances: int, name: str) -> str:
    site = site_of(parse_fleet(fleet(instances), "fleet.yaml"))
    chat = f"rps={CHAT_RPS * instances},requests={CHAT_RPS * instances * SECONDS},prompt=700,output=150,spread=0.8"
    documents = f"rps={DOCUMENT_RPS * instances},requests={round(DOCUMENT_RPS * instances * SECONDS)}"
    short = generate(parse_spec(chat), Random(3))
    long = generate(parse_spec(documents + ",prompt=60000,output=300,spread=0.3"), Random(4))
    both = sorted((*short.requests, *long.requests), key=lambda request: request.arrival)
    trace = replace(short, requests=tuple(replace(request, index=i) for i, request in enumerate(both)))
    run = simulate(trace, site, policy(name), Conditions(), Random(0))
    chats = [job for job in run.jobs if job.request.prompt < LONG]
    papers = [waited(job) for job in run.jobs if job.request.prompt >= LONG]
    waits = sorted(waited(job) for job in chats)
    gaps = sorted((job.done - job.first) / max(1, job.output - 1) for job in chats)
    cells = (
        f"{instances} | {name} | {mean(waits):.2f} s | {at(waits, 0.9):.2f} s | {at(waits, 0.99):.2f} s"
        f" | {1000 * at(gaps, 0.5):.0f} ms | {mean(papers):.1f} s | {max(papers):.1f} s"
        f" | {sum(job.moved for job in run.jobs)} of {len(run.jobs)}"
    )
    return f"| {cells} |"


def waited(job: Job) -> float:
    return job.first - job.request.arrival


def at(values: list[float], part: float) -> float:
    return values[int(part * len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into the decision")
    args = parser.parse_args()
    rows = [row(instances, name) for instances in (1, 2) for name in ("infermesh", "infermesh_fcfs", "round_robin")]
    table = "\n".join((*HEAD, *rows))
    print(table)
    if args.write:
        before, _, after = DECISION.read_text().partition(MARK)
        DECISION.write_text(before + table + "\n" + after[after.index("\n\n") + 1 :])


if __name__ == "__main__":
    main()
