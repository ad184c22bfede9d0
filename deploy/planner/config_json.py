"""A Hugging Face config.json as a Shape. Parameters are counted from the widths where no file states their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.planner.shape import Shape

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}
ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "mpnet",
    "distilbert",
    "electra",
    "camembert",
    "deberta",
    "deberta-v2",
    "nomic_bert",
    "new",
)
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
UNGATED = ("gelu", "gelu_new", "gelu_fast", "relu", "quick_gelu", "gelu_pytorch_tanh")


class Unreadable(ValueError):
    """What is missing or wrong in a model's description."""


def shape_of_config(config: Mapping[str, Any], source: str, weight_bytes: float | None = None) -> Shape:
    """Reads the fields that memory and speed follow from. `weight_bytes`: sum of the weight files, where known.

    Raises:
        Unreadable: a field is missing or no positive whole number.
    """
    text = config.get("text_config")  # vision-language models keep the decoder one level down
    whole = {**config, **text} if isinstance(text, dict) else config
    layers = _count(whole, "num_hidden_layers", "n_layer", "num_layers")
    hidden = _count(whole, "hidden_size", "n_embd", "d_model")
    heads = _count(whole, "num_attention_heads", "n_head")
    kv_heads = _count(whole, "num_key_value_heads", "multi_query_group_num", "num_kv_heads", default=heads)
    if whole.get("multi_query_attention") is False:  # ChatGLM states the group number also where it is not used
        kv_heads = heads
    head_dim = _count(whole, "head_dim", "kv_channels", default=hidden // heads)
    kind = str(whole.get("model_type", ""))
    encoder = kind in ENCODERS
    gated = (not encoder and str(whole.get("hidden_act", "silu")) not in UNGATED) or kind.startswith("gemma")
    intermediate = _count(whole, "intermediate_size", "ffn_hidden_size", "n_inner", default=4 * hidden)
    vocabulary = _count(whole, "vocab_size", "padded_vocab_size")
    tied = bool(whole.get("tie_word_embeddings", encoder or kind.startswith("gemma")))
    rank = _optional(whole, "kv_lora_rank")
    rope = _optional(whole, "qk_rope_head_dim") if rank else 0
    attention = _attention(whole, hidden, heads, kv_heads, head_dim, rank, rope)
    dense = (3 if gated else 2) * hidden * intermediate
    mixed, touched = _experts(whole, hidden, layers, dense)
    table = vocabulary * hidden * (1 if tied else 2)
    body = layers * (attention + 2 * hidden)
    parameters = float(table + body + mixed)
    active = float(table + body + touched)
    window, full = _window(whole, layers)
    quantization = whole.get("quantization_config") or config.get("quantization_config") or {}
    return Shape(
        parameters=parameters,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=_count(whole, "max_position_embeddings", "seq_length", "n_positions", "max_seq_len", default=2048),
        source=source,
        intermediate=intermediate,
        vocabulary=vocabulary,
        tied=tied,
        active_parameters=active if active < parameters else None,
        kv_lora_rank=rank or None,
        rope_head_dim=rope,
        sliding_window=window,
        full_layers=full,
        dtype=_dtype(whole, quantization),
        quantization=str(quantization.get("quant_method") or "") if _dtype(whole, quantization)[:3] == "int" else "",
        group_size=quantization.get("group_size") if _positive(quantization.get("group_size")) else None,
        weight_bytes=weight_bytes,
        encoder=encoder,
    )


def _attention(
    whole: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head_dim: int, rank: int, rope: int
) -> int:
    """Parameters of one layer's attention."""
    if not rank:
        return hidden * head_dim * (2 * heads + 2 * kv_heads)
    nope, value = _count(whole, "qk_nope_head_dim"), _count(whole, "v_head_dim")
    query = _optional(whole, "q_lora_rank")
    asked = heads * (nope + rope)
    queries = hidden * query + query * asked if query else hidden * asked
    return queries + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden


def _experts(whole: Mapping[str, Any], hidden: int, layers: int, dense: int) -> tuple[int, int]:
    """(parameters of all feed-forward layers, those that one token uses)."""
    experts = _optional(whole, *EXPERTS)
    if not experts:
        return layers * dense, layers * dense
    one = 3 * hidden * (_optional(whole, "moe_intermediate_size") or _count(whole, "intermediate_size"))
    chosen = _optional(whole, "num_experts_per_tok", "num_experts_per_token") or 2
    shared = _optional(whole, "n_shared_experts") * one
    first = _optional(whole, "first_k_dense_replace")
    mixed, router = layers - first, hidden * experts
    return (
        first * dense + mixed * (experts * one + shared + router),
        first * dense + mixed * (chosen * one + shared + router),
    )


def _window(whole: Mapping[str, Any], layers: int) -> tuple[int | None, int | None]:
    """(window in tokens, layers that look beyond it)."""
    window, pattern = _optional(whole, "sliding_window"), _optional(whole, "sliding_window_pattern")
    if not window or whole.get("use_sliding_window") is False:
        return None, None
    kinds = whole.get("layer_types")
    if isinstance(kinds, list):
        full = sum(1 for kind in kinds if kind == "full_attention")
        return (window, full) if full < layers else (None, None)
    if pattern:
        return window, layers // pattern
    return window, layers // 2 if whole.get("model_type") == "gemma2" else 0


def _dtype(whole: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    method = str(quantization.get("quant_method", ""))
    bits = quantization.get("bits") or quantization.get("w_bit")
    if quantization.get("load_in_4bit") or bits == 4:
        return "int4"
    if bits == 8 or quantization.get("load_in_8bit"):
        return "int8"
    if "fp8" in method:
        return "fp8"
    return DTYPES.get(str(whole.get("dtype") or whole.get("torch_dtype") or "float16"), "fp16")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _optional(whole: Mapping[str, Any], *names: str) -> int:
    """The first that is a whole number above 0; 0 if none is."""
    return next((int(whole[name]) for name in names if _positive(whole.get(name))), 0)


def _count(whole: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = whole.get(name)
        if value is None:
            continue
        if not _positive(value):
            raise Unreadable(f"{name} is {value!r}, it must be a whole number above 0")
        return int(value)
    if default is None:
        raise Unreadable(f"{names[0]} is missing")
    return default
