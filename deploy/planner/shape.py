"""What a model is made of, as far as memory and speed follow from it."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of one parameter by dtype. int4 and int8 keep a scale (and a zero) for each group, see memory.py.
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class Gguf:
    """Sizes that a GGUF file states, in bytes. `layers[i]`: all tensors of block i; `output`: output norm and head;
    `embedding`: the token table, which stays in the host's RAM."""

    layers: tuple[float, ...]
    output: float
    embedding: float
    quantization: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """A transformer. Counts, and widths in numbers (not bytes)."""

    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int  # tokens
    source: str  # where these numbers come from
    intermediate: int | None = None
    vocabulary: int | None = None
    tied: bool = False  # the embedding table is the output head too
    active_parameters: float | None = None  # of a mixture of experts: used by one token
    kv_lora_rank: int | None = None  # MLA: width of the latent vector that is cached
    rope_head_dim: int = 0  # MLA: cached beside it
    sliding_window: int | None = None  # tokens
    full_layers: int | None = None  # layers that look beyond the window; None: none where there is a window
    dtype: str = "fp16"
    quantization: str = ""  # how int8 and int4 weights are made, in vLLM's word: awq, gptq, compressed-tensors
    group_size: int | None = None  # of int4 weights: neighbours that share a scale
    weight_bytes: float | None = None  # where the files say
    gguf: Gguf | None = None
    encoder: bool = False

    @property
    def active(self) -> float:
        return self.active_parameters or self.parameters

    @property
    def attention(self) -> str:
        """The family's name for how keys and values are shared."""
        if self.kv_lora_rank:
            return "MLA"
        if self.kv_heads == self.heads:
            return "MHA"
        return "MQA" if self.kv_heads == 1 else "GQA"

    @property
    def windowed_layers(self) -> int:
        return self.layers - (self.full_layers or 0) if self.sliding_window else 0


def tp_fault(shape: Shape, tp: int, dtype: str) -> str:
    """Why the model cannot be split over `tp` cards; empty if it can."""
    if shape.heads % tp:
        allowed = [size for size in range(1, shape.heads + 1) if shape.heads % size == 0 and size <= 16]
        return f"tp {tp} does not divide {shape.heads} attention heads; it may be {', '.join(map(str, allowed))}"
    if shape.kv_heads % tp and tp % shape.kv_heads and not shape.kv_lora_rank:
        return f"tp {tp} and {shape.kv_heads} KV heads: one must divide the other"
    if dtype == "int4" and shape.group_size and shape.intermediate and shape.intermediate % (shape.group_size * tp):
        return (
            f"int4 groups of {shape.group_size} × tp {tp} do not divide the intermediate size {shape.intermediate}; "
            "take a smaller tp, or weights quantized with smaller groups"
        )
    return ""
