"""Starting vLLM: settings -> environment and engine arguments (pure), the blocking load, and what its failures mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from infermesh.errors import MeshError, Reason
from services.llm.engines.vllm_orphan import LEADER
from services.llm.engines.vllm_ray import reserved_group
from services.llm.settings import LlmSettings

CPU_KV_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Host:
    """What this process may use."""

    gpus: int
    cores: int


@dataclass(frozen=True, slots=True)
class Launched:
    """A running engine and what is built on it. The types are vLLM's."""

    engine: Any
    renderer: Any
    counters: Any
    chat_template: str | None


def refuse_bad_source(source: str) -> None:
    """Before minutes of loading.

    Raises:
        MeshError: FAILED_PRECONDITION.
    """
    path = Path(source).expanduser()
    if not is_local(source):
        return
    if not path.exists():
        raise _failed(f"the model folder {path} is missing: give a folder that holds config.json, or a hub name")
    if path.is_dir() and not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        raise _failed(f"the folder {path} holds no config.json, so it is not a model in the Hugging Face layout")


def is_local(source: str) -> bool:
    return source.startswith(("/", "./", "../", "~")) or Path(source).expanduser().exists()


def environment(settings: LlmSettings, host: Host) -> dict[str, str]:
    """Variables that vLLM and its children read; those already set win."""
    quiet = settings.log_level != "debug"
    wanted = {
        # The engine's process is made while grpc runs here, and grpc does not survive a fork.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "WARNING" if quiet else "INFO",
        "TRANSFORMERS_VERBOSITY": "error" if quiet else "info",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if is_local(settings.source):
        wanted["HF_HUB_OFFLINE"] = "1"
    if "otlp_traces_endpoint" in settings.vllm.engine_args:  # vLLM's own spans say whose they are
        wanted |= {"OTEL_SERVICE_NAME": "vllm", "OTEL_RESOURCE_ATTRIBUTES": "service.namespace=infermesh"}
        if settings.instance_id:
            wanted["OTEL_RESOURCE_ATTRIBUTES"] += f",service.instance.id={quote(settings.instance_id)}"
    if not host.gpus:
        wanted |= _cpu_environment(settings, host)
    return wanted


def _cpu_environment(settings: LlmSettings, host: Host) -> dict[str, str]:
    """By itself vLLM binds its threads to the first cores of the machine, so two engines on one host would share a core
    while others idle; unbound, the scheduler spreads them. One core is left to this process.
    """
    ranks = max(1, settings.vllm.tp) * settings.vllm.pp
    wanted = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, (host.cores - 1) // ranks)),
    }
    if ranks == 1:
        # Lets the worker live in the engine's process: a third of the start-up is the imports of a process more.
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return wanted


def engine_arguments(settings: LlmSettings, host: Host) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs. `engine_args` of the settings have the last word."""
    options = settings.vllm
    tp = options.tp or max(1, host.gpus // options.pp)
    arguments: dict[str, Any] = {
        "model": str(Path(settings.source).expanduser()) if is_local(settings.source) else settings.source,
        "dtype": options.dtype,
        "kv_cache_dtype": options.kv_cache_dtype,
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": options.pp,
        "enable_prefix_caching": True,
        "worker_extension_cls": "services.llm.engines.vllm_orphan.EndWithLeader",
        "disable_log_stats": False,
        "enable_logging_iteration_details": True,  # else nobody hears how far the prompts are
    }
    if options.max_context:
        arguments["max_model_len"] = options.max_context
    if options.quantization:
        arguments["quantization"] = options.quantization
    if options.reasoning_parser:
        arguments["reasoning_parser"] = options.reasoning_parser  # so that a grammar waits for the end of reasoning
    if settings.max_running:
        arguments["max_num_seqs"] = settings.max_running
    if host.gpus:
        arguments["gpu_memory_utilization"] = options.vram_ratio
    else:
        # Compiling takes a compiler and a minute, for little on this class of machine.
        arguments |= {"kv_cache_memory_bytes": CPU_KV_BYTES, "enforce_eager": True}
        if tp * options.pp == 1:
            arguments["distributed_executor_backend"] = "uni"
    return arguments | options.engine_args


def refuse_unknown_arguments(given: Mapping[str, Any], known: set[str]) -> None:
    """
    Raises:
        MeshError: FAILED_PRECONDITION naming every one.
    """
    if unknown := sorted(set(given) - known):
        raise _failed(f"engine_args: vLLM's engine takes no {', '.join(unknown)}")


def launch(settings: LlmSettings, progress: Callable[[str], None], events: str) -> Launched:
    """Loads the model; blocks for as long as that takes, so it runs in a thread. `events`: endpoint for the engine's KV
    events, unless the operator sends them elsewhere.

    Raises:
        MeshError: FAILED_PRECONDITION with what is wrong and what to do.
    """
    refuse_bad_source(settings.source)
    progress("importing vLLM")
    try:
        return _launch(settings, progress, events)
    except MeshError:
        raise
    except ImportError as error:
        raise _failed(f"vLLM cannot be imported ({error}): run this service in .venv-llm, see `make setup`") from error
    except Exception as error:
        raise _failed(explain(error, settings.source)) from error


def explain(error: BaseException, source: str) -> str:
    """What went wrong and what to do, in a line or two."""
    what = str(error).strip() or type(error).__name__
    if "Engine core initialization failed" in what or "EngineCore" in what:
        return (
            f"the engine for {source} did not start; its own lines above tell why. When it is memory: lower "
            "max_context, vram_ratio or max_running, take more cards (tp) or a quantised model"
        )
    if isinstance(error, OSError) or "huggingface" in what.lower():
        return (
            f"{source} cannot be read or fetched ({what.splitlines()[0]}): check the name, the network (proxy "
            "variables, HF_ENDPOINT for a mirror), or give a local folder"
        )
    return f"vLLM refuses {source} as configured: {what}"


def _launch(settings: LlmSettings, progress: Callable[[str], None], events: str) -> Launched:
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.platforms import current_platform

    gpus = 0 if current_platform.is_cpu() else current_platform.device_count()
    host = Host(gpus=gpus, cores=len(os.sched_getaffinity(0)))
    for name, value in environment(settings, host).items():
        os.environ.setdefault(name, value)
    os.environ[LEADER] = str(os.getpid())

    from dataclasses import fields

    from vllm.config import KVEventsConfig, StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from services.llm.engines.vllm_render import Renderer
    from services.llm.engines.vllm_stats import Counters, stat_logger

    refuse_unknown_arguments(settings.vllm.engine_args, {field.name for field in fields(AsyncEngineArgs)})
    arguments = engine_arguments(settings, host)
    # JSON without spaces: a model that has lost its way fills the room between two fields with white space for ever.
    shape = {"backend": "xgrammar", "disable_any_whitespace": True}
    arguments["structured_outputs_config"] = StructuredOutputsConfig(
        **(shape | arguments.get("structured_outputs_config", {}))
    )
    arguments.setdefault(
        "kv_events_config", KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=events)
    )
    progress("starting the engine: weights, then the KV cache")
    counters = Counters()
    logs_steps = bool(settings.vllm.engine_args.get("enable_logging_iteration_details"))
    config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
    if group := reserved_group(os.environ):
        config.parallel_config.placement_group = group
    engine = AsyncLLM.from_vllm_config(
        config, stat_loggers=[stat_logger(counters, in_order=_in_order(config), logs_steps=logs_steps)]
    )
    try:
        template = settings.vllm.chat_template.read_text() if settings.vllm.chat_template else None
        renderer = Renderer(settings.vllm, engine.model_config, engine.renderer, template)
    except BaseException:
        engine.shutdown()
        raise
    return Launched(engine, renderer, counters, template)


def _in_order(config: Any) -> bool:
    """Whether prompts are computed one after the other: by one engine, and the long ones without leaving room."""
    return config.parallel_config.data_parallel_size == 1 and not config.scheduler_config.long_prefill_token_threshold


def _failed(message: str) -> MeshError:
    return MeshError(Reason.FAILED_PRECONDITION, message)
