"""Settings -> vLLM's environment and arguments; what its failures mean. None of this needs vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infermesh.errors import MeshError, Reason
from services.llm.engines.vllm_identity import text_digest, tokenizer_digest, weights_version
from services.llm.engines.vllm_launch import (
    Host,
    engine_arguments,
    environment,
    explain,
    refuse_bad_source,
    refuse_unknown_arguments,
)
from services.llm.settings import LlmSettings

CPU, CARDS = Host(gpus=0, cores=2), Host(gpus=8, cores=64)


def settings(source: str = "org/model", max_running: int | None = None, **options: Any) -> LlmSettings:
    return LlmSettings(engine="vllm", model="m", source=source, max_running=max_running, vllm=options)


def test_every_option_passes_through() -> None:
    given = settings(
        max_running=32,
        tp=4,
        pp=2,
        vram_ratio=0.8,
        kv_cache_dtype="fp8",
        quantization="awq",
        dtype="float16",
        max_context=8192,
        reasoning_parser="qwen3",
        engine_args={"swap_space": 2, "enable_prefix_caching": False},
    )
    arguments = engine_arguments(given, CARDS)
    assert arguments["model"] == "org/model"
    assert (arguments["tensor_parallel_size"], arguments["pipeline_parallel_size"]) == (4, 2)
    assert arguments["gpu_memory_utilization"] == 0.8
    assert (arguments["kv_cache_dtype"], arguments["quantization"], arguments["dtype"]) == ("fp8", "awq", "float16")
    assert (arguments["max_model_len"], arguments["max_num_seqs"]) == (8192, 32)
    assert arguments["reasoning_parser"] == "qwen3"
    assert arguments["swap_space"] == 2 and arguments["enable_prefix_caching"] is False
    assert "enforce_eager" not in arguments and "distributed_executor_backend" not in arguments


def test_tp_defaults_to_the_visible_cards() -> None:
    assert engine_arguments(settings(), CARDS)["tensor_parallel_size"] == 8
    assert engine_arguments(settings(pp=2), CARDS)["tensor_parallel_size"] == 4
    assert engine_arguments(settings(), CPU)["tensor_parallel_size"] == 1


def test_a_cpu_is_shared_with_others() -> None:
    arguments = engine_arguments(settings(), CPU)
    assert arguments["kv_cache_memory_bytes"] == 1 << 30 and "gpu_memory_utilization" not in arguments
    wanted = environment(settings(), Host(gpus=0, cores=16))
    assert (wanted["VLLM_CPU_OMP_THREADS_BIND"], wanted["OMP_NUM_THREADS"]) == ("nobind", "15")
    assert environment(settings(tp=2), CPU)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in environment(settings(), CARDS)


def test_the_hub_is_left_alone_only_for_a_local_folder(tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE" not in environment(settings(), CARDS)
    assert environment(settings(str(tmp_path)), CARDS)["HF_HUB_OFFLINE"] == "1"
    assert environment(settings(), CARDS)["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_unknown_engine_arguments_are_all_named() -> None:
    refuse_unknown_arguments({"a": 1}, {"a", "b"})
    with pytest.raises(MeshError, match="takes no x, y") as refused:
        refuse_unknown_arguments({"y": 1, "a": 1, "x": 1}, {"a"})
    assert refused.value.reason is Reason.FAILED_PRECONDITION


def test_bad_sources(tmp_path: Path) -> None:
    refuse_bad_source("org/model")
    with pytest.raises(MeshError, match="is missing"):
        refuse_bad_source("/no/such/folder")
    with pytest.raises(MeshError, match=r"holds no config\.json"):
        refuse_bad_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    refuse_bad_source(str(tmp_path))


def test_failures_are_explained() -> None:
    assert "lower max_context" in explain(RuntimeError("Engine core initialization failed. See above"), "m")
    assert "HF_ENDPOINT" in explain(OSError("We couldn't connect to the hub"), "org/m")
    assert "architectures" in explain(ValueError("Model architectures ['X'] are not supported"), "m")


def test_equal_weights_have_equal_versions(tmp_path: Path) -> None:
    def model(name: str, weights: bytes) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "qwen3"}')
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        return folder

    weights = bytes(range(256)) * 4096
    base = model("base", weights)
    other = model("elsewhere", weights)
    tuned = model("tuned", weights[:-1] + b"\0")
    numbers = {"dtype": "bfloat16"}
    assert weights_version(base, numbers) == weights_version(other, numbers)
    assert weights_version(base, numbers) != weights_version(tuned, numbers)
    assert weights_version(base, numbers) != weights_version(base, {"dtype": "float16"})
    assert weights_version(base / "model.safetensors", numbers)
    assert tokenizer_digest(base) == tokenizer_digest(tuned)
    assert text_digest("a") != text_digest("b")
