"""What a started vLLM engine knows of itself -> EngineInfo."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import vllm
from vllm.platforms import current_platform
from vllm.renderers.hf import resolve_chat_template

from registry.endpoint import Capacity, Hardware
from services.llm.engine import EngineInfo
from services.llm.engines.vllm_identity import text_digest, tokenizer_digest, weights_version
from services.llm.engines.vllm_launch import Launched, is_local
from services.llm.settings import LlmSettings, VllmOptions

SERVED = frozenset(
    {"token_ids", "logprobs", "prompt_logprobs", "n", "json_schema", "json_object", "regex", "grammar", "choice"}
    | {"structural_tag", "resume"}
)


def engine_info(settings: LlmSettings, launched: Launched) -> tuple[EngineInfo, Any]:
    """The second is a tokenizer of our own: vLLM's is busy in its threads, and a fast tokenizer bears one at a time."""
    config = launched.engine.vllm_config
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    tokenizer = launched.engine.renderer.get_tokenizer()
    source = _local_copy(settings.source, model.revision)
    dtype = str(model.dtype).removeprefix("torch.")
    numbers = {"dtype": dtype, "quantization": model.quantization or "", "kv_cache": str(cache.cache_dtype)}
    template = _template(settings.vllm, launched, tokenizer)
    parsers = {"tools": settings.vllm.tool_parser, "reasoning": settings.vllm.reasoning_parser}
    info = EngineInfo(
        engine="vllm",
        engine_version=vllm.__version__,
        model=settings.model,
        dtype=dtype,
        quantization=model.quantization or "",
        hardware=_hardware(parallel.tensor_parallel_size, parallel.pipeline_parallel_size),
        capacity=Capacity(
            context_max=model.max_model_len,
            max_running=config.scheduler_config.max_num_seqs,
            kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
            kv_block=cache.block_size,
        ),
        features=SERVED | {name for name, parser in parsers.items() if parser},
        weights_version=weights_version(source, numbers) if source else "",
        tokenizer_digest=tokenizer_digest(source if source.is_dir() else source.parent) if source else "",
        template_digest=text_digest(template),
    )
    return info, copy.deepcopy(tokenizer)


def _hardware(tp: int, pp: int) -> Hardware:
    if current_platform.is_cpu():
        return Hardware(device="cpu", tp=tp, pp=pp)
    return Hardware(
        device=current_platform.get_device_name().removeprefix("NVIDIA "),
        count=tp * pp,
        memory_mib=current_platform.get_device_total_memory() >> 20,
        tp=tp,
        pp=pp,
    )


def _template(options: VllmOptions, launched: Launched, tokenizer: Any) -> str:
    if options.prompt_template is not None:
        return json.dumps(options.prompt_template.model_dump(), sort_keys=True)
    try:
        return (
            resolve_chat_template(tokenizer, launched.chat_template, None, model_config=launched.engine.model_config)
            or ""
        )
    except Exception:  # a tokenizer that renders chats by itself, without a template
        return type(tokenizer).__name__


def _local_copy(source: str, revision: str | None) -> Path | None:
    """Where the weights lie: the source itself, or the hub's cache of it."""
    if is_local(source):
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
