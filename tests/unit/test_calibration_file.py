"""The calibration file: found by what a speed depends on, by instances, `plan` and `sim`; faults by their path."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.fleet import FleetError, parse_fleet
from deploy.planner.calibration import (
    Calibration,
    Calibrations,
    Key,
    calibrations_text,
    key_of_endpoint,
    key_of_instance,
    parse_calibrations,
)
from deploy.planner.measured import with_measured
from registry.endpoint import Endpoint, Hardware, Speed
from services.gateway.simulator.fleet import site_of

SPEED = {"prefill_tps": 4300.0, "prefill_doubling_ctx": 55_000.0, "step_ms": 27.0, "kv_us_per_ktoken": 45.0}
ENDPOINT = Endpoint(
    id="a800-1-a",
    kind="llm",
    host="10.0.0.1",
    port=1,
    model="qwen",
    engine="vllm",
    dtype="bfloat16",
    hardware=Hardware(device="A800-80G", count=4, tp=4),
    speed=Speed(prefill_tps=1.0, source="catalogue"),
)
ENTRY = Calibration(
    key_of_endpoint(ENDPOINT), {**SPEED, "fixed_ms": 30.0}, {"instance": "a800-1-a", "at": "2026-01-01"}
)
FLEET = """
version: 1
models: [{id: qwen, kind: llm, source: q, dtype: DTYPE}, {id: gte, kind: embedding, source: g}]
nodes: [{name: a, device: A800-80G, count: 8}]
instances:
  - {id: one, node: a, model: qwen, engine: vllm, tp: 4}
  - {id: two, node: a, model: qwen, engine: vllm, tp: 8}
  - {id: told, node: a, model: qwen, engine: vllm, tp: 4, speed: {prefill_tps: 9}}
  - {id: gte-1, node: a, model: gte, replicas: 2, cards: [6]}
"""


def test_what_is_written_is_read_again():
    found = Calibrations().with_one(ENTRY).with_one(replace(ENTRY, key=replace(ENTRY.key, tp=8)))
    assert parse_calibrations(calibrations_text(found), "file") == found
    again = found.with_one(replace(ENTRY, speed={**SPEED, "step_ms": 30.0}))
    assert len(again.entries) == 2 and again.of(ENTRY.key).speed["step_ms"] == 30.0
    assert parse_calibrations("", "file") == Calibrations()


def test_an_instance_takes_what_was_measured_unless_its_operator_declared_a_speed():
    found = Calibrations((ENTRY,))
    assert found.calibrated(ENDPOINT).speed == Speed(**SPEED, fixed_ms=30.0, source="calibrated")
    declared = replace(ENDPOINT, speed=Speed(prefill_tps=1.0, source="declared"))
    assert found.calibrated(declared) is declared
    for other in (
        replace(ENDPOINT, model="other"),
        replace(ENDPOINT, engine="openai-http"),
        replace(ENDPOINT, dtype="float16"),
        replace(ENDPOINT, quantization="awq"),
        replace(ENDPOINT, hardware=replace(ENDPOINT.hardware, tp=8, count=8)),
        replace(ENDPOINT, hardware=replace(ENDPOINT.hardware, device="H20-96G")),
    ):
        assert found.calibrated(other) is other


@pytest.mark.parametrize(("dtype", "meets"), [("bf16", True), ("auto", True), ("fp16", False), ("int8", False)])
def test_a_fleet_file_leaves_open_what_it_does_not_say(dtype, meets):
    fleet = parse_fleet(FLEET.replace("DTYPE", dtype), "fleet")
    keys = {instance.id: key_of_instance(fleet, instance) for instance in fleet.instances}
    assert keys["one"].meets(ENTRY.key) is meets
    assert not keys["two"].meets(ENTRY.key)
    assert keys["gte-1"] == Key("gte", "sentence-transformers", "A800-80G", 1, dtype="auto", replicas=2)


def test_the_newest_counts():
    newer = replace(
        ENTRY, key=replace(ENTRY.key, dtype="fp16"), speed={**SPEED, "step_ms": 1.0}, measured={"at": "2027"}
    )
    assert Calibrations((newer, ENTRY)).of(Key("qwen")).speed["step_ms"] == 1.0


def test_sim_takes_what_was_measured_before_what_is_reckoned_and_after_what_is_told():
    fleet = parse_fleet(FLEET.replace("DTYPE", "bf16"), "fleet")
    speeds = {one.id: one.speed for one in site_of(fleet, with_measured(fleet, {}, Calibrations((ENTRY,)))).endpoints}
    assert speeds["one"] == Speed(**SPEED, source="calibrated")
    assert speeds["two"].source == "prior"
    assert (speeds["told"].prefill_tps, speeds["told"].source) == (9, "declared")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 2", "version: must be 1"),
        ("{", "not YAML"),
        ("version: 1\ncalibrations: [{model: m, speed: {step_ms: 0}}]", r"calibrations\[0\]: speed.step_ms: 0"),
        ("version: 1\ncalibrations: [{model: m, speed: {steps: 1}}]", r"calibrations\[0\]: speed.steps: not one of"),
        ("version: 1\ncalibrations: [{model: m, card: x, speed: {}}]", "card: not one of"),
        ("version: 1\ncalibrations: [{model: m}]", "'speed' is missing"),
        ("version: 1\ncalibrations: [3]", "must be a mapping"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(text, said):
    with pytest.raises(FleetError, match=said):
        parse_calibrations(text, "file")
