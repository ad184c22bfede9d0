"""The header of a GGUF model (of all files of a split one) as a Shape with the size of every layer.

llama.cpp keeps the token table in the host's RAM and puts whole layers on cards; the output norm and head go with the
last one. What a tensor takes is what its file says: a "q2_k" file holds several kinds of quantization.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from deploy.planner.config_json import Unreadable
from deploy.planner.shape import Gguf, Shape

_BLOCK = re.compile(r"blk\.(\d+)\.")


def shape_of_gguf(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, float, float]], source: str) -> Shape:
    """`metadata`: the header's keys; `tensors`: (name, bytes, number of values) of all files.

    Raises:
        Unreadable: a key or the tensors are missing.
    """
    kind = str(metadata.get("general.architecture") or "")
    if not kind:
        raise Unreadable("general.architecture is missing: is it a model, and its first part?")
    expected = metadata.get("split.tensors.count")
    layers = _count(metadata, f"{kind}.block_count")
    sizes, output, table, parameters, seen, vocabulary = [0.0] * layers, 0.0, 0.0, 0.0, 0, 0
    hidden = _count(metadata, f"{kind}.embedding_length")
    for name, size, values in tensors:
        seen += 1
        parameters += values
        block = _BLOCK.match(name)
        if block and int(block[1]) < layers:
            sizes[int(block[1])] += size
        elif name.startswith("token_embd."):
            table += size
            vocabulary = round(values / hidden)
        else:
            output += size
    if not seen:
        raise Unreadable("it holds no tensors: give the first part of a split model, with the other parts beside it")
    if isinstance(expected, int) and seen < expected:
        raise Unreadable(f"{seen} of {expected} tensors found: parts of the split model are missing beside it")
    heads = _count(metadata, f"{kind}.attention.head_count")
    kv_heads = _count(metadata, f"{kind}.attention.head_count_kv", default=heads)
    window = metadata.get(f"{kind}.attention.sliding_window")
    rank = metadata.get(f"{kind}.attention.kv_lora_rank")
    if output < table / 10:  # tied: the table is copied to the card as the head
        output += table
    return Shape(
        parameters=parameters,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_count(metadata, f"{kind}.attention.key_length", default=hidden // heads),
        max_context=_count(metadata, f"{kind}.context_length", default=4096),
        source=source,
        intermediate=_count(metadata, f"{kind}.feed_forward_length", default=4 * hidden),
        vocabulary=vocabulary or None,
        kv_lora_rank=int(rank) if rank else None,
        rope_head_dim=int(metadata.get(f"{kind}.rope.dimension_count") or 0) if rank else 0,
        sliding_window=int(window) if window else None,
        dtype="int4",
        weight_bytes=sum(sizes) + output + table,
        gguf=Gguf(tuple(sizes), output, table, str(metadata.get("general.file_type", ""))),
    )


def _count(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, list):  # per layer, where they differ
        value = max(value, default=None)
    if not isinstance(value, int) or value <= 0:
        raise Unreadable(f"{key} is {'missing' if value is None else repr(value)}")
    return value
