"""What `infermesh sim` tells of its runs, and of a recorded trace against what was measured. Pure, but for printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infermesh.cli.printing import table

COLUMNS = ("POLICY", "DONE", "SHED", "DEGR", "TTFT", "P50", "P99", "TPOT P50", "P99", "E2E P99", "GOODPUT", "CACHE")
TIMES = ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "e2e_p50_s", "e2e_p99_s")
APART = ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "e2e_p99_s")  # those that have a column


def recorded_elsewhere(run: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """The instances of the recording that the run's fleet lacks; empty = it was recorded on this fleet."""
    here = next(iter(run["policies"].values()))["instances"]
    return ", ".join(id for id in measured["instances"] if id not in here)


def compare(runs: Sequence[dict[str, Any]], measured: Mapping[str, Any] | None) -> None:
    """Puts what was measured to the runs of the first fleet, beside each policy's error; to those of the others the
    change to the first fleet's simulation at the same rate. Without `measured` there is no error to tell."""
    first = [run for run in runs if run["fleet"] == runs[0]["fleet"]]
    today = {(run["rate"], name): said for run in first for name, said in run["policies"].items()}
    for run in runs:
        of_today = run["fleet"] == runs[0]["fleet"]
        if of_today and measured is not None and run["rate"] == 1:
            run["measured"] = measured
        for name, said in run["policies"].items():
            if not of_today or measured is None:
                said.pop("error", None)
            if not of_today and (before := today.get((run["rate"], name))):
                said["change"] = {key: _ratio(said[key], before[key]) for key in TIMES}


def _ratio(now: float | None, before: float | None) -> float | None:
    return round(now / before - 1, 6) if now is not None and before else None


def print_run(run: Mapping[str, Any]) -> None:
    """A run as a table, a line a policy."""
    shown = f", load {run['load']:g} of {run['capacity']:.4g}" if "load" in run else ""
    print(f"{run['trace']} on {run['fleet']}, rate {run['rate']:.4g}{shown}, seed {run['seed']}")
    policies = run["policies"]
    apart = next((key for key in ("error", "change") if any(key in said for said in policies.values())), "")
    columns = (*COLUMNS, *(f"{apart.upper()} {word}" for word in ("TTFT", "P50", "P99", "E2E P99") if apart))
    rows = [
        (*_cells(name, said), *(_percent(said.get(apart), key) for key in APART if apart))
        for name, said in policies.items()
    ]
    if measured := run.get("measured"):
        rows.insert(0, _measured_cells(measured, len(columns)))
    table(columns, rows)
    if apart == "error":
        best = next(said["error"] for said in policies.values() if "error" in said)
        print(f"error: simulated / measured - 1, over the {best['requests']} requests that both completed; of those")
        print(
            f"{best['same_instance']:.0%} ran where they ran in reality. A change smaller than the error means nothing."
        )
    if apart == "change":
        print("change: against the same policy and rate on the first fleet")
    for name, said in policies.items():
        places = [
            f"{id} {place['requests']} ({place['busy_ratio']:.0%})"
            for id, place in said["instances"].items()
            if place["requests"]
        ]
        print(f"{name}: requests (busy): {', '.join(places) or 'none'}")
    print()


def _number(said: Mapping[str, Any], key: str, digits: int, unit: str) -> str:
    return "-" if said[key] is None else f"{said[key]:.{digits}f} {unit}"


def _cells(name: str, said: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        *(str(said[key]) for key in ("completed", "shed", "degraded")),
        *(_number(said, key, 2, "s") for key in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s")),
        *(_number(said, key, 0, "ms") for key in ("tpot_p50_ms", "tpot_p99_ms")),
        _number(said, "e2e_p99_s", 1, "s"),
        f"{said['goodput_share']:.1%}",
        f"{said['cache_hit_ratio']:.1%}",
    )


def _measured_cells(measured: Mapping[str, Any], count: int) -> tuple[str, ...]:
    cells = (
        *("measured", str(measured["completed"]), str(measured["requests"] - measured["completed"]), ""),
        *(_number(measured, key, 2, "s") for key in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s")),
        *("", "", _number(measured, "e2e_p99_s", 1, "s"), "", f"{measured['cache_hit_ratio']:.1%}"),
    )
    return (*cells, *[""] * (count - len(cells)))


def _percent(apart: Mapping[str, Any] | None, key: str) -> str:
    value = apart.get(key) if apart else None
    return "-" if value is None else f"{value:+.1%}"
