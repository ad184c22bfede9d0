"""What was calibrated in the place of what is reckoned. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from deploy.fleet import Fleet
from deploy.planner.calibration import Calibration, Calibrations, key_of_instance
from deploy.planner.estimate import Estimate
from deploy.planner.placed import Plan
from deploy.planner.roofline import EncoderSpeed, LlmSpeed
from deploy.planner.traced import Traced, given


def with_measured(fleet: Fleet, reckoned: Mapping[str, Estimate], found: Calibrations) -> dict[str, Estimate]:
    """Instance id -> estimate, whose speed is the measured one where there is any."""
    estimates = dict(reckoned)
    for instance in fleet.instances:
        if entry := found.of(key_of_instance(fleet, instance)):
            kind = fleet.model(instance.model).kind
            estimates[instance.id] = measured(kind, estimates.get(instance.id, Estimate()), entry)
    return estimates


def measured(kind: str, estimate: Estimate, entry: Calibration) -> Estimate:
    """The estimate with the speed of a calibration."""
    source = _source(entry)

    def one(name: str, unit: str) -> Traced:
        return given(name, entry.speed[name], unit, source)

    if kind != "llm":
        return replace(
            estimate, calibrated=True, pace=EncoderSpeed(one("fixed_ms", "ms"), one("tokens_per_s", "tokens/s"))
        )
    speed = LlmSpeed(
        one("prefill_tps", "tokens/s"),
        one("prefill_doubling_ctx", "tokens"),
        one("step_ms", "ms"),
        one("kv_us_per_ktoken", "µs"),
    )
    return replace(estimate, calibrated=True, speed=speed)


def plan_with_measured(plan: Plan, found: Calibrations) -> Plan:
    """The same placement with measured speeds, for its check in `sim`; the roofline decided what runs where."""
    placed = []
    for one in plan.placed:
        entry = found.of(key_of_instance(plan.fleet, one.instance))
        if entry is not None:
            kind = plan.fleet.model(one.instance.model).kind
            one = replace(
                one, estimate=measured(kind, one.estimate, entry), reasons=(*one.reasons, f"speed {_source(entry)}")
            )
        placed.append(one)
    return replace(plan, placed=tuple(placed))


def _source(entry: Calibration) -> str:
    where = " ".join(filter(None, (str(entry.measured.get("instance", "")), entry.at)))
    return f"measured by `infermesh calibrate` ({where})" if where else "measured by `infermesh calibrate`"
