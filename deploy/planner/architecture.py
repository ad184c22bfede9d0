"""A fleet file's inline `architecture:` as a Shape, and back."""

from __future__ import annotations

from deploy.fleet import Architecture, Model
from deploy.planner.shape import Shape


def shape_of_architecture(model: Model, told: Architecture) -> Shape:
    """`dtype: auto` is read as fp16."""
    return Shape(
        parameters=told.parameters,
        layers=told.layers,
        hidden=told.hidden_size,
        heads=told.heads,
        kv_heads=told.kv_heads or told.heads,
        head_dim=told.head_dim or told.hidden_size // told.heads,
        max_context=told.max_context,
        source="architecture of the fleet file",
        intermediate=told.intermediate_size,
        vocabulary=told.vocabulary,
        tied=model.kind != "llm",
        active_parameters=told.active_parameters,
        kv_lora_rank=told.kv_lora_rank,
        rope_head_dim=told.rope_head_dim or 0,
        sliding_window=told.sliding_window if told.sliding_window and told.sliding_window < told.max_context else None,
        dtype="fp16" if model.dtype == "auto" else model.dtype,
        group_size=128 if model.dtype == "int4" else None,
        encoder=model.kind != "llm",
    )


def architecture_of_shape(shape: Shape) -> Architecture:
    """What `plan -o` writes for a model whose files it has read, so that the result can be simulated anywhere."""
    return Architecture(
        parameters=shape.parameters,
        layers=shape.layers,
        hidden_size=shape.hidden,
        heads=shape.heads,
        kv_heads=None if shape.kv_heads == shape.heads else shape.kv_heads,
        head_dim=None if shape.head_dim == shape.hidden // shape.heads else shape.head_dim,
        max_context=shape.max_context,
        intermediate_size=shape.intermediate,
        vocabulary=shape.vocabulary,
        sliding_window=shape.sliding_window if not shape.full_layers else None,
        kv_lora_rank=shape.kv_lora_rank,
        rope_head_dim=shape.rope_head_dim or None,
        active_parameters=shape.active_parameters,
    )


def dtype_of(model: Model, shape: Shape) -> str:
    """What the weights are loaded as: the file's word, else the model's own. vLLM's `auto` halves fp32 models."""
    if model.dtype != "auto":
        return model.dtype
    return "bf16" if model.kind == "llm" and shape.dtype == "fp32" else shape.dtype
