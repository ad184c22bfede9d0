"""What routing is worth in the simulator: two example fleets, every policy, four loads -> docs/routing.md, docs/img.

    make routing TRACE=mooncake.jsonl [ARGS="--limit 3000"]        an hour of one core for the whole trace

Each fleet is one `infermesh sim --policy all --load 0.5,0.7,0.9,1.1 --plot … --json`. `--keep FOLDER` leaves what they
print there, and takes what it finds there instead of running it again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FLEETS = ("mixed-72b", "unlike-cards")
LOADS = "0.5,0.7,0.9,1.1"
OURS, BLIND = "infermesh", "infermesh_blind"
COLUMNS = ("fleet", "load", "rate", "infermesh", "best peer", "ratio", "blind", "ratio", "misses", "peer's", "ratio")


def simulated(fleet: str, trace: Path, limit: int, folder: Path) -> dict[str, Any]:
    """What `infermesh sim --json` says of one fleet; its picture lies beside it."""
    found = folder / f"{fleet}.json"
    if not found.exists():
        command = (
            *(sys.executable, "-m", "infermesh.cli", "sim", "--json", "--policy", "all", "--load", LOADS),
            *("--trace", str(trace), "--fleet", f"deploy/examples/{fleet}.yaml", "--limit", str(limit)),
            *("--plot", str(folder / f"{fleet}.svg")),
        )
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout
        found.write_bytes(said)
    return dict(json.loads(found.read_text()))


def rows(fleet: str, said: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line a load. The best peer is the one with the least mean TTFT, or with the fewest misses, each for itself."""
    lines = []
    for run in said["runs"]:
        policies = run["policies"]
        peers = {name: numbers for name, numbers in policies.items() if not name.startswith(OURS)}
        ttft = policies[OURS]["ttft_mean_s"]
        quickest = min(peers, key=lambda name: peers[name]["ttft_mean_s"])
        best, blind = peers[quickest]["ttft_mean_s"], policies.get(BLIND, {}).get("ttft_mean_s")
        missed = {name: 1 - numbers["goodput_share"] for name, numbers in policies.items()}
        surest = min(peers, key=missed.__getitem__)
        lines.append(
            (
                fleet,
                f"{run['load']:g}",
                f"{run['rate']:.3f}",
                f"{ttft:.2f} s",
                f"{best:.2f} s, {quickest}",
                f"{ttft / best:.2f}",
                f"{blind:.2f} s" if blind else "",
                f"{ttft / blind:.2f}" if blind else "",
                f"{missed[OURS]:.1%}",
                f"{missed[surest]:.1%}, {surest}",
                f"{missed[OURS] / missed[surest]:.2f}" if missed[surest] else "",
            )
        )
    return lines


def page(tables: list[tuple[str, ...]], trace: Path, limit: int) -> str:
    head = (ROOT / "docs/routing.md").read_text().partition("## Measured")[0]
    what = f"the first {limit:,} requests of {trace.name}" if limit else trace.name
    bound = f" ARGS='--limit {limit}'" if limit else ""
    lines = [
        f"{head}## Measured",
        "",
        f"Command: `make routing TRACE={trace.name}{bound}`.",
        f"Requests: {what}. Time is virtual: the machine decides only how long a run takes",
        f"({os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join("---" for _ in COLUMNS) + " |",
        *("| " + " | ".join(row) + " |" for row in tables),
        "",
        *(f"![{fleet}](img/routing-{fleet}.svg)" for fleet in dict.fromkeys(row[0] for row in tables)),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    tables = []
    with TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for fleet in FLEETS:
            tables += rows(fleet, simulated(fleet, args.trace.resolve(), args.limit, folder))
            picture = ROOT / f"docs/img/routing-{fleet}.svg"
            picture.write_text((folder / f"{fleet}.svg").read_text())
    (ROOT / "docs/routing.md").write_text(page(tables, args.trace, args.limit))


if __name__ == "__main__":
    main()
