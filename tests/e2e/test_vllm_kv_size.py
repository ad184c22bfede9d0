"""The planner's KV arithmetic against the line that vLLM prints of itself."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploy.fleet import Model
from deploy.model_files.read import read_config
from deploy.planner.architecture import dtype_of
from deploy.planner.memory import Setup, kv_per_token
from tests.kit.llm import PYTHON, ROOT

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]
SPACE = 256 << 20
MODELS: dict[str, dict[str, Any]] = {
    "grouped-query, bf16": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "dtype": "bfloat16"},
    "multi-head, fp32": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "dtype": "float32"},
}


@pytest.mark.parametrize("name", MODELS)
def test_kv_tokens_agree_with_vllms_own_line(name: str, tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 512, "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 3, "hidden_act": "silu", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, **MODELS[name],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [PYTHON, "-P", str(ROOT / "tests" / "kit" / "vllm_kv_size.py"), str(tmp_path), str(SPACE), "2048"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=580)
    line = re.search(r"KV cache size: ([\d,]+) tokens", done.stderr + done.stdout)
    assert line, done.stderr[-3000:]
    said = int(line[1].replace(",", ""))
    shape = read_config(tmp_path / "config.json")
    dtype = dtype_of(Model(id="m", kind="llm"), shape)  # vLLM loads fp32 models in 16 bits, and so does its cache
    ours = SPACE / kv_per_token(shape, Setup(dtype, 2048)).value
    assert ours == pytest.approx(said, rel=0.05), line[0]
