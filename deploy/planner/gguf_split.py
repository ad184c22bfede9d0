"""Whole layers of a GGUF model over several cards, as llama.cpp and its RPC workers hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.planner.catalogue import Card
from deploy.planner.memory import RATIO, Setup, _llama_cpp_overhead, kv_per_token
from deploy.planner.shape import Shape
from deploy.planner.traced import Traced, given


@dataclass(frozen=True, slots=True)
class Split:
    """`layers[i]` on card i, the output head on the last one that has any. `need`: bytes on all cards together if it
    were one; `ram`: bytes on the host. `fits` is false where layers are left over."""

    layers: tuple[int, ...]
    need: Traced
    ram: Traced
    fits: bool


def on_one_card(shape: Shape, length: int, kv_dtype: str = "fp16") -> Traced:
    """Bytes of VRAM with every layer on one card, for a context of `length` tokens."""
    assert shape.gguf is not None
    setup = Setup(dtype=shape.dtype, length=length, kv_dtype=kv_dtype, engine="openai-http")
    layers = given("all layers", sum(shape.gguf.layers), "B", shape.source)
    head = given("output norm and head", shape.gguf.output, "B", shape.source)
    context = given("context", length, "tokens", "planned")
    cached = (kv_per_token(shape, setup) * context).named("KV cache", "B")
    return (layers + head + cached + _llama_cpp_overhead(shape, setup)).named("VRAM", "B")


def split_layers(shape: Shape, cards: Sequence[Card], length: int, kv_dtype: str = "fp16") -> Split:
    """Layers in proportion to what each card can hold, never more than it holds."""
    assert shape.gguf is not None
    setup = Setup(dtype=shape.dtype, length=length, kv_dtype=kv_dtype, engine="openai-http")
    buffer = _llama_cpp_overhead(shape, setup).value
    cache = kv_per_token(shape, setup).value * length / shape.layers
    layer = sum(shape.gguf.layers) / shape.layers + cache
    rooms = [max(0.0, card.memory * RATIO - buffer) for card in cards]
    if rooms:
        rooms[-1] = max(0.0, rooms[-1] - shape.gguf.output)
    most = [int(room // layer) for room in rooms]
    total = sum(most)
    fits = total >= shape.layers
    counts = [count * shape.layers // total for count in most] if total else [0 for _ in most]
    while fits and sum(counts) < shape.layers:  # what rounding left over, to the card with the most room
        index = max(range(len(counts)), key=lambda i: most[i] - counts[i])
        counts[index] += 1
    table = given("token table", shape.gguf.embedding, "B", shape.source)
    return Split(tuple(counts), on_one_card(shape, length, kv_dtype), (table * 1.0).named("RAM", "B"), fits)
