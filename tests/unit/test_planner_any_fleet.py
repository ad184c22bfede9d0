"""Whatever the heap is made of: a plan or a list of faults, no card twice, nothing that does not fit."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest
import yaml

from deploy.fleet import FleetError, parse_fleet
from deploy.launch.commands import start_faults
from deploy.planner.catalogue import shipped
from deploy.planner.document import fleet_document, plan_document
from deploy.planner.estimate import inline_shapes
from deploy.planner.planner import plan

LLMS: list[dict[str, Any]] = [
    {"parameters": 72.3e9, "layers": 80, "hidden_size": 8192, "heads": 64, "max_context": 32768, "vocabulary": 152064},
    {"parameters": 8.03e9, "layers": 32, "hidden_size": 4096, "heads": 32, "kv_heads": 8, "max_context": 131072},
    {"parameters": 0.5e9, "layers": 24, "hidden_size": 896, "heads": 14, "kv_heads": 2, "max_context": 32768},
    {"parameters": 30.5e9, "active_parameters": 3.3e9, "layers": 48, "hidden_size": 2048, "heads": 32, "kv_heads": 4,
     "head_dim": 128, "max_context": 40960},
    {"parameters": 671e9, "active_parameters": 37e9, "layers": 61, "hidden_size": 7168, "heads": 128,
     "max_context": 163840, "kv_lora_rank": 512, "rope_head_dim": 64},
    {"parameters": 7.2e9, "layers": 32, "hidden_size": 4096, "heads": 32, "kv_heads": 8, "max_context": 32768,
     "sliding_window": 4096},
]  # fmt: skip
ENCODER = {"parameters": 568e6, "layers": 24, "hidden_size": 1024, "heads": 16, "max_context": 8192}
DEVICES = [name for name, card in shipped().cards.items() if not card.cpu]


def made_up(chance: Random) -> dict[str, Any]:
    models: list[dict[str, Any]] = []
    for number in range(chance.randint(1, 2)):
        dtype = chance.choice(["auto", "bf16", "fp16", "fp8", "int8", "int4"])
        models.append(
            {"id": f"m{number}", "kind": "llm", "source": "x/m", "dtype": dtype, "architecture": chance.choice(LLMS)}
        )
    if len(models) == 2 and chance.random() < 0.5:
        models[0]["fallback"] = "m1"
    for kind in ("embedding", "rerank"):
        if chance.random() < 0.6:
            models.append({"id": kind, "kind": kind, "source": "x/e", "architecture": ENCODER})
    nodes: list[dict[str, Any]] = []
    for number in range(chance.randint(1, 5)):
        node = {"name": f"n{number}", "device": chance.choice(DEVICES), "count": chance.choice([1, 2, 3, 4, 5, 8])}
        node |= {
            "interconnect": chance.choice(["", "nvlink", "pcie"]),
            "network": chance.choice(["", "rdma", "ethernet"]),
        }
        nodes.append(node)
    if chance.random() < 0.3:
        nodes.append({"name": "cpu", "device": "CPU-AVX512", "memory_gib": 256, "cpus": 64})
    traffic = {"requests_per_s": chance.choice([0.01, 0.5, 5, 100]), "prompt_tokens": chance.choice([100, 2000, 20000])}
    traffic |= {"output_tokens": chance.choice([1, 200, 2000])}
    if chance.random() < 0.5:
        traffic |= {"long_prompt_tokens": chance.choice([30000, 100000]), "long_share": 0.1}
    fleet: dict[str, Any] = {"version": 1, "models": models, "nodes": nodes}
    if chance.random() < 0.9:
        fleet["traffic"] = traffic
    if chance.random() < 0.7:
        fleet["routing"] = {
            "objective": {"ttft_s": chance.choice([0.2, 2, 30]), "tpot_ms": chance.choice([20, 80, 500])}
        }
    if chance.random() < 0.3:
        fleet["expect"] = {"ttft_s": 0.2, "concurrent": 10, "card_tokens_per_s": 30, "requests_per_day": 1e5}
    return fleet


@pytest.mark.parametrize("seed", range(6))
def test_any_fleet_gives_a_plan_or_its_faults(seed: int) -> None:
    plans = 0
    for number in range(8):
        raw = made_up(Random(1000 * seed + number))
        fleet = parse_fleet(yaml.safe_dump(raw))
        try:
            found = plan(fleet, inline_shapes(fleet), shipped(), {}, "x")
        except FleetError as error:
            assert all("fits nowhere" in fault.message for fault in error.faults), (raw, str(error))
            continue
        plans += 1
        again = parse_fleet(yaml.safe_dump(fleet_document(found.fleet)))
        assert again.instances == found.fleet.instances, raw
        assert plan_document(found, None)["instances"]
        faults = [fault for fault in start_faults(again) if not fault.path.endswith((".quantization", ".pp", ".dtype"))]
        assert faults == [], raw
        taken = [(one.instance.node, card) for one in found.placed if one.estimate.setup for card in one.instance.cards]
        assert len(taken) == len(set(taken)), raw
        for one in found.placed:
            if one.estimate.memory:
                assert one.estimate.memory.fits and one.reasons, raw
                low, high = one.instance.context or (0, 1)
                assert low < high <= one.estimate.memory.kv_tokens.value, raw
        served = {one.instance.model for one in found.placed}
        missing = {model.id for model in fleet.models} - served
        assert not missing or any(id in line for id, line in itertools.product(missing, found.short)), raw
    assert plans > 0
