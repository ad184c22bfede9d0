"""What a model takes on each card, and what is left for keys and values (DESIGN §10). Bytes unless a name says else.

vLLM divides a card as: total × ratio − weights − activations of its profiling run − what is not PyTorch's = KV cache
(its own log lines name the same parts). The KV cache of one token is layers × 2 × KV heads of the card × head width ×
bytes; an MLA model caches one latent vector a layer instead, on every card of a tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deploy.planner.catalogue import GIB, Card
from deploy.planner.shape import BYTES, Shape
from deploy.planner.traced import Traced, ceiling, floor, given, larger, number

RATIO = 0.9  # of the visible memory, vLLM's gpu_memory_utilization
HIGHEST_RATIO = 0.95  # beyond it other users of the card (CUDA graphs, a desktop) end an engine now and then
MAX_RUNNING = 256
BATCH_TOKENS, BATCH_TOKENS_LARGE = 2048, 8192  # vLLM's prompt tokens a step below and above LARGE_CARD
LARGE_CARD = 70 * GIB
RUNTIME = 0.3 * GIB  # CUDA context and NCCL: 0.2 to 0.35 GiB in published vLLM logs (vllm-project/vllm#10517, #13061)
SAMPLER_BYTES = 24  # a logit in fp32, sorted, with its index, as probability and as running sum
MICRO_BATCH = 512  # llama.cpp's tokens a step
GROUP_BYTES = 2.5  # scale and zero of a group of int4 weights
DEFAULT_GROUP = 128
ENCODER_RUNTIME = 0.7 * GIB  # a PyTorch process
ENCODER_BATCH_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Setup:
    """How an instance is to run. `length`: tokens of prompt + answer that one request takes."""

    dtype: str
    length: int
    tp: int = 1
    pp: int = 1
    kv_dtype: str = "fp16"
    ratio: float = RATIO
    engine: str = "vllm"
    max_running: int = MAX_RUNNING

    @property
    def cards(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one card: `weights`, `overhead` and `room` (for KV; below 0: what is missing). Of the instance: `kv_token`
    [bytes a token, all cards], `kv_tokens`, `concurrent` requests of the set-up's length."""

    weights: Traced
    overhead: Traced
    room: Traced
    kv_card: Traced  # bytes a token on one card
    kv_token: Traced
    kv_tokens: Traced
    concurrent: Traced

    @property
    def fits(self) -> bool:
        return self.concurrent.value >= 1


def weights(shape: Shape, dtype: str) -> Traced:
    """All of them. Where the files' own size is known for this dtype, that; int8, int4 and fp8 models keep their
    embedding table and head in 16 bits, and int4 ones a scale and a zero for each group."""
    if shape.weight_bytes and dtype == shape.dtype:
        return given("weights", shape.weight_bytes, "B", f"size of the files, {shape.source}")
    parameters = given("parameters", shape.parameters, "", shape.source)
    size = given("bytes a parameter", BYTES[dtype], "B", dtype)
    if dtype in ("fp32", "fp16", "bf16"):
        return (parameters * size).named("weights", "B")
    if dtype == "int4":
        group = given("group size", shape.group_size or DEFAULT_GROUP, "", "int4 weights that share a scale")
        size = (size + number(GROUP_BYTES) / group).named("bytes a quantized parameter", "B")
    if not shape.vocabulary:
        return (parameters * size).named("weights", "B")
    vocabulary = given("vocabulary", shape.vocabulary, "", shape.source)
    hidden = given("hidden size", shape.hidden, "", shape.source)
    table = (vocabulary * hidden * (1.0 if shape.tied else 2.0)).named("embedding and head")
    return ((parameters - table) * size + table * 2.0).named("weights", "B")


def kv_per_token(shape: Shape, setup: Setup) -> Traced:
    """Bytes a token on one card. Windowed layers keep `sliding_window` tokens at most, so a long request pays less."""
    layers = given("layers", shape.layers, "", shape.source)
    here = ceiling(layers / setup.pp).named("layers a stage") if setup.pp > 1 else layers
    size = given("bytes a cached value", BYTES[setup.kv_dtype], "B", f"KV cache in {setup.kv_dtype}")
    if shape.kv_lora_rank:
        latent = given("latent width", shape.kv_lora_rank, "", shape.source)
        rope = given("rope width", shape.rope_head_dim, "", shape.source)
        return (here * (latent + rope) * size).named("KV a token and card", "B")
    kv_heads = given("KV heads", shape.kv_heads, "", shape.source)
    heads = larger(kv_heads / setup.tp, 1.0).named("KV heads a card") if setup.tp > 1 else kv_heads
    width = given("head width", shape.head_dim, "", shape.source)
    if not shape.sliding_window or setup.length <= shape.sliding_window:
        return (here * 2.0 * heads * width * size).named("KV a token and card", "B")
    window = given("window", shape.sliding_window, "tokens", shape.source)
    length = given("request length", setup.length, "tokens", "planned")
    share = given("share of layers with a window", shape.windowed_layers / shape.layers, "", shape.source)
    kept = (share * window / length + (number(1) - share)).named("cached share of a request")
    return (here * 2.0 * heads * width * size * kept).named("KV a token and card", "B")


def overhead(shape: Shape, setup: Setup, card: Card) -> Traced:
    """Activations at their peak, and the runtime."""
    if setup.engine == "openai-http":
        return _llama_cpp_overhead(shape, setup)
    tokens = BATCH_TOKENS_LARGE if card.memory >= LARGE_CARD and not card.name.startswith("A100") else BATCH_TOKENS
    batch = given("tokens a step", tokens, "", "vLLM's default for a card of this size")
    hidden = given("hidden size", shape.hidden, "", shape.source)
    inner = given("intermediate size", shape.intermediate or 4 * shape.hidden, "", shape.source)
    layer = (batch * (inner * 3.0 / setup.tp + hidden * 2.5) * 2.0).named("activations of a step", "B")
    seats = given("running requests", setup.max_running, "", "max_running")
    vocabulary = given("vocabulary", shape.vocabulary or 32000, "", shape.source)
    sampler = (seats * vocabulary * float(SAMPLER_BYTES)).named("sampler", "B")
    runtime = given("runtime", RUNTIME, "B", "CUDA context and NCCL, published vLLM logs")
    return (larger(layer, sampler) + runtime).named("activations and runtime", "B")


def _llama_cpp_overhead(shape: Shape, setup: Setup) -> Traced:
    """llama.cpp's compute buffer without flash attention: scores of one micro-batch, and its logits."""
    batch = given("micro-batch", MICRO_BATCH, "tokens", "llama.cpp's default")
    heads = given("heads", shape.heads, "", shape.source)
    length = given("request length", setup.length, "tokens", "context of a slot")
    vocabulary = given("vocabulary", shape.vocabulary or 32000, "", shape.source)
    scores = (heads * length * batch * 4.0 / setup.tp).named("attention scores", "B")
    return (scores + batch * vocabulary * 4.0).named("compute buffer", "B")


def memory(shape: Shape, setup: Setup, card: Card) -> Memory:
    """The division of one card under tensor and pipeline parallelism. Of uneven stages the largest is taken."""
    whole = weights(shape, setup.dtype)
    part = whole / float(setup.tp) if setup.tp > 1 else whole
    if setup.pp > 1:
        layers = given("layers", shape.layers, "", shape.source)
        part = part * ceiling(layers / setup.pp).named("layers a stage") / layers
    held = part.named("weights a card", "B")
    visible = given("visible memory", card.memory, "B", f"{card.name}: {card.sources.get('memory_mib', 'the node')}")
    extra = overhead(shape, setup, card)
    room = (visible * setup.ratio - held - extra).named("room for KV a card", "B")
    token = kv_per_token(shape, setup)
    tokens = floor(larger(room / token, 0.0)).named("KV tokens", "tokens")
    length = given("request length", setup.length, "tokens", "planned")
    copies = setup.pp if shape.kv_lora_rank else setup.cards
    return Memory(
        weights=held,
        overhead=extra,
        room=room,
        kv_card=token,
        kv_token=(token * float(copies)).named("KV a token", "B"),
        kv_tokens=tokens,
        concurrent=floor(tokens / length).named("concurrent requests"),
    )


def fit(shape: Shape, setup: Setup, card: Card) -> str:
    """`fits`: two requests or more; `tight`: one, or one only when the engine may have 0.95 of the card; else `no`."""
    if memory(shape, setup, card).concurrent.value >= 2:
        return "fits"
    return "tight" if memory(shape, replace(setup, ratio=HIGHEST_RATIO), card).fits else "no"


def encoder_memory(shape: Shape, dtype: str) -> Traced:
    """One embedding or rerank process on a card: weights, the activations of one batch, the runtime."""
    hidden = given("hidden size", shape.hidden, "", shape.source)
    inner = given("intermediate size", shape.intermediate or 4 * shape.hidden, "", shape.source)
    batch = given("tokens a batch", ENCODER_BATCH_TOKENS, "", "--batch-tokens")
    active = (batch * (inner + hidden * 4.0) * BYTES[dtype]).named("activations of a batch", "B")
    runtime = given("runtime", ENCODER_RUNTIME, "B", "a PyTorch process")
    return (weights(shape, dtype) + active + runtime).named("one process", "B")


def rule_of_thumb(shape: Shape, dtype: str) -> Traced:
    """Parameters × bytes × 1.25, the rule that seed 000_3179620a66654959.txt gives. For comparison only."""
    parameters = given("parameters", shape.parameters, "", shape.source)
    return (parameters * BYTES[dtype] * 1.25).named("rule of thumb", "B")
