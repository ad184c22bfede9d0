"""The part of docs/bench.md about routing: what a decision takes, and what the prefix index weighs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HEADING = "## A routing decision"
BYTES_LIMIT, COLLECTION_LIMIT_MS = 250, 5.0


def measured(module: str) -> Any:
    """In a process of its own: what it allocates must not count against another."""
    command = (sys.executable, "-m", module, "--json")
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def report() -> str:
    from pick import LIMIT_US

    picks, prefixes = measured("tests.bench.pick"), measured("tests.bench.prefix")
    lines = [
        HEADING,
        "",
        "A 16k-token prompt (64 KiB) is hashed, matched, chosen for and reserved; nine in ten begin like one of 20",
        "documents. `after` is what follows and nobody waits for: the release, what is learned, the entry into the",
        "prefix index. CPU time of the thread over 2,800 decisions, the quietest of five runs, at real-time priority",
        "where the machine allows it (tests/bench/pick.py). The five runs make the same decisions; `p99, quiet` is",
        "that of each decision's quietest time: what the dearest ones cost without what the machine does beside them.",
        "",
        "| instances | p50 | p99, quiet | p99 | limit of p99 | hashing, p50 | after, p50 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count, said in picks.items():
        limit = f"{LIMIT_US[int(count)]:g} µs" if int(count) in LIMIT_US else ""
        numbers = [f"{said[key]:.0f} µs" for key in ("whole_p50_us", "whole_p99_quiet_us", "whole_p99_us")]
        rest = [f"{said[key]:.0f} µs" for key in ("hash_p50_us", "after_p50_us")]
        lines.append("| " + " | ".join((count, *numbers, limit, *rest)) + " |")
    lines.append("")
    for count in ("10", "1000"):
        said = prefixes[f"index_{count}"]
        lines.append(
            f"* {said['entries']:,} prefix blocks on {int(count):,} instances: {said['bytes_each']:.0f} bytes each "
            f"(limit {BYTES_LIMIT}), longest of five full garbage collections {said['gc_ms']:.1f} ms "
            f"(limit {COLLECTION_LIMIT_MS:g}; tests/bench/prefix.py)"
        )
    return "\n".join(lines)
