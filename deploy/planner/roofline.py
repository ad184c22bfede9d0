"""Estimated speed of an instance, in the terms of DESIGN §6: peaks of the card × the efficiency its generation states.

Prefill multiplies, so it follows the tensor rate; decoding reads all weights and all cached tokens at every step, so it
follows the memory's bandwidth (Williams et al., Roofline, CACM 52(4), 2009; Pope et al., Efficiently Scaling
Transformer Inference, MLSys 2023). Tensor parallelism adds two all-reduces a layer. These are estimates until
`calibrate` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.planner.catalogue import Card
from deploy.planner.memory import Setup, kv_per_token, weights
from deploy.planner.shape import Shape
from deploy.planner.traced import Traced, given, number

ASSUMED = "assumed for {}; `calibrate` measures"
NVLINK_REACHED = 0.8
PIPELINE = 0.75  # of the stages' joint rate that a pipeline reaches with chunked prompts
HOP_MS = {"": 0.1, "rdma": 0.1, "ethernet": 0.5}  # from stage to stage: inside a host, between hosts
ENCODER_FIXED_MS, ENCODER_FIXED_MS_CPU = 6.0, 15.0


@dataclass(frozen=True, slots=True)
class LlmSpeed:
    """`prefill_tps` [tokens/s], `doubling` [tokens of context at which attention doubles a token's cost], `step_ms`,
    `kv_us_per_ktoken` [µs a step per 1,000 resident tokens]."""

    prefill_tps: Traced
    doubling: Traced
    step_ms: Traced
    kv_us_per_ktoken: Traced

    def prefill_s(self, new: float, cached: float = 0.0) -> float:
        """Seconds for `new` prompt tokens behind `cached` ones, alone on the instance."""
        return new / self.prefill_tps.value * (1 + (cached + new / 2) / self.doubling.value)


@dataclass(frozen=True, slots=True)
class EncoderSpeed:
    fixed_ms: Traced
    tokens_per_s: Traced


def llm_speed(shape: Shape, setup: Setup, card: Card, *, nvlink: bool, network: str = "") -> LlmSpeed:
    """`nvlink`: the cards of the instance are joined by it; `network`: between the hosts of pipeline stages."""
    reached = card.generation.efficiency
    source = f"{card.name}: {card.sources.get('tflops', 'catalogue')}"
    multiplied, rate = card.rate(setup.dtype)
    active = given("active parameters", shape.active, "", shape.source)
    work = (active * 2.0).named("FLOP a token")
    peak = given(f"{multiplied} rate", rate * 1e12, "FLOP/s", source)
    share = given("prefill efficiency", reached.prefill, "", ASSUMED.format(card.generation.name))
    token = (work / (peak * share * float(setup.tp))).named("multiplying a token", "s")
    layers = given("layers", shape.layers, "", shape.source)
    hidden = given("hidden size", shape.hidden, "", shape.source)
    if setup.tp > 1:
        # A ring all-reduce moves 2 (n − 1) / n of the data over each link.
        ring = given("ring factor", 2 * (setup.tp - 1) / setup.tp, "", f"tp {setup.tp}")
        link = _link(card, nvlink)
        spread = (layers * 2.0 * hidden * 2.0 * ring / link).named("all-reduce a token", "s")
        token = (token + spread).named("a token's prefill", "s")
    stages = PIPELINE * setup.pp if setup.pp > 1 else 1.0
    prefill = (number(stages) / token).named("prefill_tps", "tokens/s")
    width = given("heads × head width", shape.heads * shape.head_dim, "", shape.source)
    doubling = (work / (layers * width * 4.0)).named("prefill_doubling_ctx", "tokens")
    return LlmSpeed(prefill, doubling, _step(shape, setup, card, nvlink, network), _resident(shape, setup, card))


def _link(card: Card, nvlink: bool) -> Traced:
    if nvlink and card.nvlink_gbs:
        figure = card.nvlink_gbs / 2 * NVLINK_REACHED * 1e9
        return given("link", figure, "B/s", f"NVLink {card.nvlink_gbs:g} GB/s both ways, {NVLINK_REACHED:g} reached")
    return given("link", card.pcie_gbs * 1e9, "B/s", f"PCIe, {card.pcie_gbs:g} GB/s reached by collectives")


def _bandwidth(card: Card) -> Traced:
    source = f"{card.name}: {card.sources.get('bandwidth_gbs', 'catalogue')}"
    return given("bandwidth", card.bandwidth_gbs * 1e9, "B/s", source)


def _step(shape: Shape, setup: Setup, card: Card, nvlink: bool, network: str) -> Traced:
    """One decode step without resident tokens: every stage reads its weights in turn."""
    share = given("decode efficiency", card.generation.efficiency.decode, "", ASSUMED.format(card.generation.name))
    step = weights(shape, setup.dtype) / float(setup.tp) / (_bandwidth(card) * share) * 1000.0
    if setup.tp > 1:
        fast = nvlink and card.nvlink_gbs > 0
        each = 4 + 1.8 * setup.tp if fast else 15 + 8 * setup.tp
        latency = given("all-reduce", each, "µs", f"{'NVLink' if fast else 'PCIe'}, {setup.tp} cards, assumed")
        layers = given("layers", shape.layers, "", shape.source)
        step = step + layers * 2.0 * latency / 1000.0
    if setup.pp > 1:
        step = step + given("hop", HOP_MS[network], "ms", network or "inside a host") * float(setup.pp - 1)
    return step.named("step_ms", "ms")


def _resident(shape: Shape, setup: Setup, card: Card) -> Traced:
    share = given("KV efficiency", card.generation.efficiency.kv, "", ASSUMED.format(card.generation.name))
    read = kv_per_token(shape, setup) * 1000.0 * float(setup.pp) / (_bandwidth(card) * share) * 1e6
    return read.named("kv_us_per_ktoken", "µs")


def encoder_speed(shape: Shape, dtype: str, card: Card, processes: int = 1) -> EncoderSpeed:
    """An embedding or rerank instance of `processes` cards. Looking words up costs no multiplication."""
    multiplied, rate = card.rate(dtype)
    peak = given(f"{multiplied} rate", rate * 1e12, "FLOP/s", f"{card.name}: {card.sources.get('tflops', 'catalogue')}")
    share = given("encoder efficiency", card.generation.efficiency.encoder, "", ASSUMED.format(card.generation.name))
    body = given("parameters", shape.active, "", shape.source)
    if shape.vocabulary:
        body = (body - given("embedding table", shape.vocabulary * shape.hidden, "", shape.source)).named("multiplied")
    rate_of_all = (peak * share * float(processes) / (body * 2.0)).named("tokens_per_s", "tokens/s")
    fixed = ENCODER_FIXED_MS_CPU if card.cpu else ENCODER_FIXED_MS
    return EncoderSpeed(given("fixed_ms", fixed, "ms", "launching a batch, assumed"), rate_of_all)
