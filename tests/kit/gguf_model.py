"""GGUF files with the header of a real model and holes instead of weights: sizes are real, the disk stays empty."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import GGUFWriter, quant_shape_to_byte_shape

LAYERS, HIDDEN, HEADS, KV, HEAD, INNER, VOCABULARY = 80, 8192, 64, 8, 128, 29696, 152064


def qwen_72b_q2_k(folder: Path, parts: int = 7) -> Path:
    """Qwen2.5-72B-Instruct in llama.cpp's Q2_K mixture, as its publisher ships it (seven files, the feed-forward width
    padded from 29,568 to 29,696 so that rows divide by 256): attn_v in Q4_K, attn_output and ffn_down in Q3_K, the head
    in Q6_K, all else in Q2_K. Returns the first part."""
    tensors = [("token_embd.weight", (VOCABULARY, HIDDEN), Q.Q2_K)]
    for block in range(LAYERS):
        name = f"blk.{block}"
        tensors += [
            (f"{name}.attn_q.weight", (HEADS * HEAD, HIDDEN), Q.Q2_K),
            (f"{name}.attn_k.weight", (KV * HEAD, HIDDEN), Q.Q2_K),
            (f"{name}.attn_v.weight", (KV * HEAD, HIDDEN), Q.Q4_K),
            (f"{name}.attn_output.weight", (HIDDEN, HEADS * HEAD), Q.Q3_K),
            (f"{name}.ffn_gate.weight", (INNER, HIDDEN), Q.Q2_K),
            (f"{name}.ffn_up.weight", (INNER, HIDDEN), Q.Q2_K),
            (f"{name}.ffn_down.weight", (HIDDEN, INNER), Q.Q3_K),
            (f"{name}.attn_norm.weight", (HIDDEN,), Q.F32),
            (f"{name}.ffn_norm.weight", (HIDDEN,), Q.F32),
        ]
    tensors += [("output_norm.weight", (HIDDEN,), Q.F32), ("output.weight", (VOCABULARY, HIDDEN), Q.Q6_K)]
    each = -(-len(tensors) // parts)
    paths = []
    for number in range(parts):
        path = folder / f"qwen2.5-72b-instruct-q2_k-{number + 1:05d}-of-{parts:05d}.gguf"
        _write(path, tensors[number * each : (number + 1) * each], number, parts, len(tensors))
        paths.append(path)
    return paths[0]


def _write(path: Path, tensors: list[tuple[str, tuple[int, ...], Q]], number: int, parts: int, total: int) -> None:
    writer = GGUFWriter(path, "qwen2")
    if number == 0:
        writer.add_context_length(131072)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV)
        writer.add_file_type(10)
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", parts)
    writer.add_int32("split.tensors.count", total)
    size = 0
    for name, shape, kind in tensors:
        raw = quant_shape_to_byte_shape(shape, kind) if kind != Q.F32 else shape
        bytes_of = int(np.prod(raw)) * (4 if kind == Q.F32 else 1)
        dtype = np.dtype(np.float32) if kind == Q.F32 else np.dtype(np.uint8)
        writer.add_tensor_info(name, raw, dtype, bytes_of, None if kind == Q.F32 else kind)
        size += -(-bytes_of // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + size + 4096)


WORDS = ("▁the", "▁a", "▁card", "▁model", "▁token", "▁layer", "▁runs", "▁waits", "▁slow", "▁fast", "▁one", "▁two")
# Sentencepiece joins two tokens at a time, so every beginning of a word is one.
PIECES = tuple(dict.fromkeys(word[:end] for end in range(1, 8) for word in WORDS if end <= len(word)))
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def tiny_llama(path: Path, layers: int = 6, seed: int = 7) -> Path:
    """A whole model of the llama architecture with random weights, which llama.cpp loads: 64 wide, a byte vocabulary
    and a few words, a chat template. The wide initialiser keeps greedy answers from repeating one token."""
    rng = np.random.default_rng(seed)
    hidden, heads, kv, inner = 64, 4, 2, 128
    head = hidden // heads
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *PIECES]
    kinds = [2, 3, 3, *([6] * 256), *([1] * len(LETTERS + PIECES))]  # unknown, control, byte, normal
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(
        [0.0] * 3 + [-100.0] * 256 + [-50.0] * len(LETTERS) + [float(len(piece)) for piece in PIECES]
    )
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
    )

    def put(name: str, *shape: int) -> None:
        spread = 1.0 if len(shape) == 1 else 2.0 / np.sqrt(shape[-1])
        values = np.ones(shape) if len(shape) == 1 else rng.normal(0, spread, shape)
        writer.add_tensor(name, values.astype(np.float32))

    put("token_embd.weight", len(tokens), hidden)
    for block in range(layers):
        name = f"blk.{block}"
        put(f"{name}.attn_norm.weight", hidden)
        put(f"{name}.attn_q.weight", hidden, hidden)
        put(f"{name}.attn_k.weight", kv * head, hidden)
        put(f"{name}.attn_v.weight", kv * head, hidden)
        put(f"{name}.attn_output.weight", hidden, hidden)
        put(f"{name}.ffn_norm.weight", hidden)
        put(f"{name}.ffn_gate.weight", inner, hidden)
        put(f"{name}.ffn_up.weight", inner, hidden)
        put(f"{name}.ffn_down.weight", hidden, inner)
    put("output_norm.weight", hidden)
    put("output.weight", len(tokens), hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
