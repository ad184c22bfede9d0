"""Numbers that show their working, and the catalogue they begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deploy.fleet.values import Device
from deploy.planner.catalogue import shipped
from deploy.planner.traced import Traced, ceiling, floor, given, larger, number, smaller

CARDS = ("H200-141G", "H100-80G", "H20-96G", "H800-80G", "A800-80G", "A100-40G", "A100-80G", "L40S", "L20", "A10",
         "A4000", "T4", "V100-16G", "V100-32G", "P100-16G", "P40", "RTX-3090", "RTX-4080", "RTX-4090", "RTX-4000-Ada",
         "CPU-AVX2", "CPU-AVX512", "CPU-AMX")  # fmt: skip


def test_what_is_shown_is_what_was_computed() -> None:
    memory, weights = given("memory", 100, "GiB", "nvidia-smi"), given("weights", 40, "GiB", "config.json")
    room = (memory * 0.9 - (weights + 2.0)).named("room", "GiB")
    tokens = floor(room / given("per token", 5)).named("tokens")
    assert tokens.value == 9
    assert [str(step) for step in tokens.working()] == [
        "memory = 100 GiB (nvidia-smi)",
        "weights = 40 GiB (config.json)",
        "room = memory × 0.9 − (weights + 2) = 100 × 0.9 − (40 + 2) = 48 GiB",
        "per token = 5 (given)",
        "tokens = ⌊room / per token⌋ = ⌊48 / 5⌋ = 9",
    ]


@pytest.mark.parametrize(
    ("expression", "text", "value"),
    [
        (lambda a, b: (a + b) * 2.0, "(a + b) × 2", 20),
        (lambda a, b: a / (b * 2.0), "a / (b × 2)", 2),
        (lambda a, b: a - (b - 1.0), "a − (b − 1)", 7),
        (lambda a, b: a - b - 1.0, "a − b − 1", 5),
        (lambda a, b: a * b / 2.0, "a × b / 2", 8),
        (lambda a, b: ceiling(a / 3.0) + floor(b / 4.0), "⌈a / 3⌉ + ⌊b / 4⌋", 3),
        (lambda a, b: larger(a, b) - smaller(a, 1.0), "max(a, b) − min(a, 1)", 7),
        (lambda a, b: number(3) * (a - b), "3 × (a − b)", 18),
    ],
)
def test_brackets_stand_where_they_are_needed(
    expression: Callable[[Traced, Traced], Traced], text: str, value: float
) -> None:
    found = expression(given("a", 8), given("b", 2))
    assert (found.text, found.value) == (text, value)


def test_every_card_of_the_issue_is_there_with_a_source_for_each_figure() -> None:
    catalogue = shipped()
    assert set(CARDS) <= set(catalogue.cards)
    for card in catalogue.cards.values():
        told = {"bandwidth_gbs", "tflops"} | ({"nvlink_gbs"} if card.nvlink_gbs else set())
        assert told | (set() if card.cpu else {"memory_mib"}) <= set(card.sources), card.name
        assert "fp32" in card.tflops and card.bandwidth_gbs > 0
    for generation in catalogue.generations.values():
        assert generation.source and generation.engines


def test_memory_is_what_a_program_sees() -> None:
    """DESIGN §10: A800 about 81,000 MiB, L40S 46,068, T4 about 15,000; seed 003: a P40 has 22 GB."""
    cards = shipped().cards
    seen = [cards[name].memory_mib for name in ("A800-80G", "L40S", "T4", "P40")]
    assert seen == pytest.approx([81_000, 46_068, 15_000, 22_900], rel=0.01)


def _device(memory: float, bandwidth: float, tflops: dict[str, float], **more: Any) -> Device:
    return Device.model_validate({"memory_mib": memory, "bandwidth_gbs": bandwidth, "tflops": tflops, **more})


def test_devices_add_and_correct() -> None:
    both = {"fp16": 312.0, "bf16": 312.0}
    told = {
        "A800-80G": Device(nvlink_gbs=200),  # corrected: everything else stays
        "RTX-A5000": _device(24564, 768, {"fp16": 111.0, "fp32": 27.8}, compute_capability="8.6"),
        "A800-PCIe": _device(81050, 1935, both, compute_capability="8.0"),
        "Ascend-910B": _device(65536, 1600, {"fp16": 320.0}, engines=("openai-http",)),
        "B300": _device(288000, 8000, both, compute_capability="10.3"),
        "H20-141G": Device(memory_mib=143771, bandwidth_gbs=4800),
    }
    catalogue, faults = shipped().with_devices({name: device.model_dump() for name, device in told.items()})
    cards = catalogue.cards
    assert cards["A800-80G"].nvlink_gbs == 200 and cards["A800-80G"].bandwidth_gbs == 2039
    assert cards["A800-80G"].sources["nvlink_gbs"].startswith("devices:")
    assert cards["A800-PCIe"].nvlink_gbs == 0 and "vllm" in cards["RTX-A5000"].generation.engines
    assert list(cards["Ascend-910B"].generation.engines) == ["openai-http"]
    assert cards["B300"].generation.key == "9.0"  # the newest known
    assert faults == [("devices.H20-141G", "is a new card: tflops must be told too")]
    assert "did you mean A800-80G?" in shipped().fault("A800-80")
    assert shipped().cards["A800-80G"].nvlink_gbs == 400
