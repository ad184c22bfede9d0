"""A plan as the document of `plan --json`: the fleet file completed, and what the planner knows of each instance."""

from __future__ import annotations

from typing import Any

from deploy.fleet import Fleet
from deploy.planner.catalogue import GIB
from deploy.planner.placed import Placed, Plan, Tier


def fleet_document(fleet: Fleet) -> dict[str, Any]:
    """The fleet file, without what is default in it."""
    return fleet.model_dump(mode="json", exclude_defaults=True) | {"version": 1}


def plan_document(plan: Plan, verdict: dict[str, Any] | None) -> dict[str, Any]:
    """DESIGN §9. `verdict`: what the simulation of the plan gave."""
    document = fleet_document(plan.fleet)
    told = document.get("instances", [])
    document["instances"] = [{**was, **_instance(one)} for was, one in zip(told, plan.placed, strict=True)]
    document["plan"] = {
        "tiers": [_tier(tier) for tier in plan.tiers],
        "short": list(plan.short),
        "claims": list(plan.claims),
        "remarks": list(plan.remarks),
        "simulated": verdict,
    }
    return document


def _instance(one: Placed) -> dict[str, Any]:
    estimate = one.estimate
    found: dict[str, Any] = {"reasons": list(one.reasons)}
    if estimate.memory and estimate.setup:
        sums, cards = estimate.memory, estimate.setup.cards
        found |= {
            "weights_gib": round(sums.weights.value * cards / GIB, 2),
            "kv_gib": round(max(0.0, sums.room.value) * cards / GIB, 2),
            "kv_bytes_per_token": round(sums.kv_token.value),
            "kv_tokens": int(sums.kv_tokens.value),
            "max_concurrent": int(sums.concurrent.value),
            "working": [str(step) for step in sums.concurrent.working()],
        }
        if one.split:
            found["layers_per_card"] = list(one.split.layers)
            found["weights_gib"] = round(sums.weights.value * cards / GIB, 2)
            found["vram_gib"] = round(one.split.need.value / GIB, 2)
            found["ram_gib"] = round(one.split.ram.value / GIB, 2)
    elif estimate.need:
        found |= {"weights_gib": round(estimate.need.value / GIB, 2), "kv_gib": 0.0, "kv_bytes_per_token": 0}
        found |= {"kv_tokens": 0, "max_concurrent": 0, "working": [str(step) for step in estimate.need.working()]}
    if speed := estimate.speed_values():
        found["speed"] = speed
    if estimate.speed:
        numbers = (estimate.speed.prefill_tps, estimate.speed.doubling, estimate.speed.step_ms)
        for number in (*numbers, estimate.speed.kv_us_per_ktoken):
            found["working"] += [line for line in map(str, number.working()) if line not in found["working"]]
    if one.ttft_s is not None and one.tpot_ms is not None:
        found |= {"expected_ttft_s": round(one.ttft_s, 3), "expected_tpot_ms": round(one.tpot_ms, 1)}
    if one.rate:
        key = "expected_qps" if estimate.setup else "expected_tokens_per_s"
        found[key] = round(one.rate, 3)
    if one.commands:
        found["commands"] = dict(one.commands)
    return found


def _tier(tier: Tier) -> dict[str, Any]:
    def short(value: float | None) -> float | None:
        return None if value is None else round(value, 3)

    return {
        "model": tier.model,
        "tier": tier.tier,
        "unit": "tokens/s" if tier.tier in ("embedding", "rerank") else "requests/s",
        "wanted": short(tier.wanted),
        "capacity": short(tier.capacity),
        "headroom": short(tier.headroom),
        "ttft_s": short(tier.ttft_s),
        "tpot_ms": short(tier.tpot_ms),
    }
