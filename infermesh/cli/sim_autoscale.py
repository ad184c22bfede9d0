"""`infermesh sim --autoscale`: a fleet that grows and shrinks, beside the same one at a fixed size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from infermesh.cli import BAD_USAGE, Failure
from infermesh.cli.printing import remark, table

if TYPE_CHECKING:
    from services.gateway.routing.admission import Bounds
    from services.gateway.simulator.elastic import Elapsed
    from services.gateway.simulator.fleet import Site
    from services.gateway.simulator.sweep import Sweep

COLUMNS = ("FLEET", "INSTANCES", "MOST", "INSTANCE-HOURS", "DONE", "SHED", "TTFT", "P99", "TPOT P99", "MISSED")


def autoscaled(sweep: Sweep, rate: float, start_s: float) -> dict[str, Any]:
    """One trace on the growing fleet, on one of its highest number and on ones of its mean, rounded down and up."""
    from services.gateway.routing.scaling import Law
    from services.gateway.simulator.elastic import Elastic, simulate_elastic, simulate_fixed
    from services.gateway.simulator.ours import Ours

    site, trace, conditions = sweep.site, sweep.trace.at_rate(rate), sweep.conditions
    if not site.scale:
        raise Failure("--autoscale: no instance of the fleet has `max`; say between which numbers it scales", BAD_USAGE)
    bounds: Bounds = sweep.bounds
    ours = Ours(bounds=bounds, law=Law())
    grown = simulate_elastic(trace, site, ours, conditions, sweep.chance(sweep.seed), Elastic(start_s))
    found = {"autoscaled": _row(grown, site)}
    remark("autoscaled: done")
    for name, counts in _fixed(site, grown).items():
        fixed = simulate_fixed(trace, site, Ours(bounds=bounds), conditions, sweep.chance(sweep.seed), counts)
        found[name] = _row(fixed, site)
        remark(f"{name}: done")
    return found


def _fixed(site: Site, grown: Elapsed) -> dict[str, dict[str, int]]:
    """The names and sizes of what it is compared with: sizes by group."""
    means = {name: grown.instance_s_of(name) / max(grown.run.end, 1e-9) for name in site.scale}
    rounded = (
        {name: between.clamp(int(means[name])) for name, between in site.scale.items()},
        {name: between.clamp(-int(-means[name] // 1)) for name, between in site.scale.items()},
        {name: between.most for name, between in site.scale.items()},
    )
    return {f"fixed at {_sizes(counts)}": counts for counts in rounded}


def _sizes(counts: Mapping[str, int]) -> str:
    return " + ".join(str(count) for count in counts.values())


def _row(elapsed: Elapsed, site: Site) -> dict[str, Any]:
    from services.gateway.simulator.metrics import rounded, summary

    said = summary(elapsed.run, site)
    return {
        "instances_mean": rounded(elapsed.instance_s / elapsed.run.end if elapsed.run.end else 0.0),
        "instances_most": elapsed.most(),
        "instance_hours": rounded(elapsed.instance_s / 3600),
        "missed_share": rounded(1.0 - said["goodput_share"]),
        **said,
    }


def print_autoscaled(found: Mapping[str, Mapping[str, Any]]) -> None:
    """A line a fleet. MISSED: the share of all requests that did not meet the objective, shed ones among them."""
    rows = [
        (
            name,
            f"{said['instances_mean']:.2f}",
            str(said["instances_most"]),
            f"{said['instance_hours']:.1f}",
            str(said["completed"]),
            str(said["shed"]),
            *(_time(said[key], scale) for key, scale in (("ttft_mean_s", "s"), ("ttft_p99_s", "s"))),
            _time(said["tpot_p99_ms"], "ms"),
            f"{said['missed_share']:.1%}",
        )
        for name, said in found.items()
    ]
    table(COLUMNS, rows)


def _time(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.2f} s" if unit == "s" else f"{value:.0f} ms"
