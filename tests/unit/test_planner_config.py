"""config.json of the families that are served, as they are published, and what is said of a broken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.fleet import parse_fleet
from deploy.model_files import read_models
from deploy.planner.config_json import Unreadable, shape_of_config
from deploy.planner.memory import Setup, kv_per_token, weights

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN25_72B_AWQ: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29696, "num_attention_heads": 64,
    "num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
    "sliding_window": 131072, "use_sliding_window": False, "torch_dtype": "float16",
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3, "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA_3_12B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16,
        "num_hidden_layers": 48, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208,
        "max_position_embeddings": 131072, "sliding_window": 1024, "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh", "torch_dtype": "bfloat16",
    },
}  # fmt: skip
CHATGLM3_6B: dict[str, Any] = {
    "model_type": "chatglm", "hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32,
    "num_layers": 28, "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 128,
    "padded_vocab_size": 65024, "seq_length": 8192, "torch_dtype": "float16",
}  # fmt: skip
BGE_M3: dict[str, Any] = {
    "model_type": "xlm-roberta", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 24, "vocab_size": 250002, "max_position_embeddings": 8194, "hidden_act": "gelu",
    "torch_dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters", "active", "attention", "kv", "dtype"),
    [
        (LLAMA_3_8B, 8.03e9, 8.03e9, "GQA", 131_072, "bf16"),
        (QWEN25_72B_AWQ, 72.96e9, 72.96e9, "GQA", 327_680, "int4"),
        (DEEPSEEK_V3, 671e9, 37.6e9, "MLA", 70_272, "fp8"),
        (QWEN3_30B_A3B, 30.5e9, 3.3e9, "GQA", 98_304, "bf16"),
        (GEMMA_3_12B, 11.77e9, 11.77e9, "GQA", 393_216, "bf16"),
        (CHATGLM3_6B, 6.24e9, 6.24e9, "GQA", 28_672, "fp16"),
        (BGE_M3, 0.558e9, 0.558e9, "MHA", 98_304, "fp32"),
    ],
    ids=["llama-3-8b", "qwen2.5-72b-awq", "deepseek-v3", "qwen3-30b-a3b", "gemma-3-12b", "chatglm3-6b", "bge-m3"],
)
def test_published_models(
    config: dict[str, Any], parameters: float, active: float, attention: str, kv: float, dtype: str
) -> None:
    shape = shape_of_config(config, "x")
    assert shape.parameters == pytest.approx(parameters, rel=0.015)
    assert shape.active == pytest.approx(active, rel=0.03)
    assert (shape.attention, shape.dtype) == (attention, dtype)
    assert kv_per_token(shape, Setup("fp16", 1024)).value == kv


def test_awq_weights_are_what_the_published_files_take() -> None:
    """Qwen2.5-72B-Instruct-AWQ: eleven files, 41.6 GB together."""
    assert shape_of_config(QWEN25_72B_AWQ, "x").quantization == "awq"
    assert weights(shape_of_config(QWEN25_72B_AWQ, "x"), "int4").value / 1e9 == pytest.approx(41.6, rel=0.01)


def test_windows() -> None:
    """Gemma 3: five of six layers look back 1,024 tokens; a request of 8k keeps 8 full layers and 40 of 1,024."""
    shape = shape_of_config(GEMMA_3_12B, "x")
    assert (shape.sliding_window, shape.full_layers, shape.windowed_layers) == (1024, 8, 40)
    layer = 2 * 8 * 256 * 2
    assert kv_per_token(shape, Setup("fp16", 8192)).value == pytest.approx(layer * (8 + 40 / 8))
    typed = {**LLAMA_3_8B, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 16}
    assert shape_of_config(typed, "x").full_layers == 16
    assert shape_of_config({**typed, "layer_types": ["full_attention"] * 32}, "x").sliding_window is None
    assert shape_of_config(QWEN25_72B_AWQ, "x").sliding_window is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', it must be a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
    ],
)
def test_a_broken_config(change: dict[str, Any], said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        shape_of_config({**LLAMA_3_8B, **change}, "x")


def test_a_folder_is_read_with_the_size_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(LLAMA_3_8B))
    for number in (1, 2):
        with (tmp_path / "m" / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(8 << 30)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    models = ["m", "./bad", "./list", "./empty", "./gone", "no-such-owner/no-such-model", "x.gguf"]
    lines = "".join(f"  - {{id: m{i}, kind: llm, source: {source}}}\n" for i, source in enumerate(models))
    found = read_models(parse_fleet(f"version: 1\nmodels:\n{lines}"), tmp_path)
    assert found.shapes["m0"].weight_bytes == 16 << 30
    assert weights(found.shapes["m0"], "bf16").value == 16 << 30
    assert found.absent == {"m5"}
    said = [found.unread[f"m{i}"] for i in range(1, 7)]
    for text, expected in zip(
        said,
        ("not JSON", "must be a JSON object", "No such file", "./gone is not there", "is a hub name", "no such file"),
        strict=True,
    ):
        assert expected in text and "describe the model under `architecture:`" in text


def test_an_absent_model_is_no_fault_where_its_instances_are_given() -> None:
    head = "version: 1\nmodels: [{id: m, kind: llm, source: nobody/nothing}]\n"
    fleet = parse_fleet(head + "instances: [{id: i, model: m, engine: scripted}]")
    assert read_models(fleet, Path()).needed(fleet) == {}
    bare = parse_fleet(head)
    assert set(read_models(bare, Path()).needed(bare)) == {"m"}
