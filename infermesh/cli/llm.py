"""`infermesh llm`: one LLM service in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from services.llm.settings import LlmSettings

SPEED = ("prefill_tps", "prefill_doubling_ctx", "step_ms", "kv_us_per_ktoken")
VLLM = (
    *("tp", "pp", "vram_ratio", "kv_cache_dtype", "quantization", "dtype", "chat_template", "prompt_template"),
    *("time_granularity_s", "tool_parser", "reasoning_parser", "engine_args"),
)
OPENAI_HTTP = ("upstream_model", "api_key_file", "probe_timeout_s", "idle_timeout_s")
SCRIPTED = ("chat_tokens", "prefill_chunk", "fail_after_tokens", "fail_start")
SETTINGS: dict[str, dict[str, str]] = {
    f"services.llm.settings:{name}": {}
    for name in ("LlmSettings", "VllmOptions", "OpenAiHttpOptions", "ScriptedOptions")
}


def command(
    model: Annotated[str, typer.Option(help="The model id that clients use.")],
    engine: Annotated[str, typer.Option(help="vllm, openai-http or scripted.")],
    source: Annotated[
        str | None, typer.Option(help="A hub name or a local folder; for openai-http the server's base URL.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name of the model; may be repeated.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")] = None,
    advertise: Annotated[str | None, typer.Option(help="HOST:PORT that others dial.")] = None,
    registry: Annotated[str | None, typer.Option(help="mesh://H:P[,H:P], consul://H:P or consuls://H:P.")] = None,
    registry_prefix: Annotated[str | None, typer.Option(help="Of the service names in the registry.")] = None,
    registry_token_file: Annotated[Path | None, typer.Option(help="Consul's ACL token.")] = None,
    registry_ca_file: Annotated[Path | None, typer.Option(help="consuls: whom to trust.")] = None,
    registry_cert_file: Annotated[Path | None, typer.Option(help="consuls: our certificate.")] = None,
    registry_key_file: Annotated[Path | None, typer.Option(help="consuls: its key.")] = None,
    instance_id: Annotated[str | None, typer.Option(help="Its id in the mesh.")] = None,
    tier: Annotated[str | None, typer.Option(help="primary, long-context or fallback.")] = None,
    weight: Annotated[float | None, typer.Option(help="The operator's factor on its share.")] = None,
    zone: Annotated[str | None, typer.Option(help="Where it stands.")] = None,
    group: Annotated[str | None, typer.Option(help="The group of like instances that it is scaled with.")] = None,
    context: Annotated[str | None, typer.Option(help="MIN-MAX tokens of prompt and answer served here.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer that the model takes.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Requests in the batch.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may wait for it; more are refused.")] = None,
    preempt: Annotated[
        bool | None, typer.Option("--preempt/--no-preempt", help="Shorter prompts overtake longer ones (default).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="The card, as the hardware catalogue names it.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="Tokens that the KV cache holds.")] = None,
    prefill_tps: Annotated[float | None, typer.Option(help="Prompt tokens a second.")] = None,
    prefill_doubling_ctx: Annotated[
        float | None, typer.Option(help="Tokens of context at which attention doubles the cost of a token.")
    ] = None,
    step_ms: Annotated[float | None, typer.Option(help="Milliseconds a decode step.")] = None,
    kv_us_per_ktoken: Annotated[
        float | None, typer.Option(help="Microseconds a step for each 1,000 resident tokens.")
    ] = None,
    speed_source: Annotated[
        str | None, typer.Option(help="Whose numbers these are: declared (yours) or catalogue (the planner's).")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File in which `infermesh calibrate` left measured speeds.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="keys.yaml: who may call.")] = None,
    tls_cert_file: Annotated[Path | None, typer.Option(help="It serves over TLS: its certificate, PEM.")] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    operator_key_file: Annotated[Path | None, typer.Option(help="The operator's key, to register with.")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Listen beyond loopback without keys.")] = None,
    grace_s: Annotated[float | None, typer.Option(help="Seconds to finish what is running when told to stop.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Written, as JSON, once it serves.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    otlp: Annotated[str | None, typer.Option(help="OTLP/gRPC endpoint for spans; none unless told.")] = None,
    otlp_ratio: Annotated[float | None, typer.Option(help="Share of the traces that begin here, 0 .. 1.")] = None,
    tp: Annotated[int | None, typer.Option(help="vllm: tensor parallel size; unless told all visible GPUs.")] = None,
    pp: Annotated[int | None, typer.Option(help="vllm: pipeline parallel size.")] = None,
    vram_ratio: Annotated[float | None, typer.Option(help="vllm: share of each card's memory.")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="vllm: auto, fp8 …")] = None,
    quantization: Annotated[str | None, typer.Option(help="vllm: awq, gptq, fp8 …")] = None,
    dtype: Annotated[str | None, typer.Option(help="vllm: auto, float16, bfloat16, float32.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="vllm: a Jinja file instead of the model's own.")] = None,
    prompt_template: Annotated[
        Path | None, typer.Option(help="vllm: a JSON or YAML file with sys, user, ai and sep.")
    ] = None,
    time_granularity_s: Annotated[int | None, typer.Option(help="vllm: of the time in templates, seconds.")] = None,
    tool_parser: Annotated[str | None, typer.Option(help="vllm: how this model writes tool calls.")] = None,
    reasoning_parser: Annotated[str | None, typer.Option(help="vllm: how this model writes its reasoning.")] = None,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="vllm: any engine argument, NAME=VALUE (JSON or text); may be repeated.")
    ] = None,
    upstream_model: Annotated[str | None, typer.Option(help="openai-http: the server's name for the model.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="openai-http: the server's API key.")] = None,
    probe_timeout_s: Annotated[float | None, typer.Option(help="openai-http: seconds to wait for the server.")] = None,
    idle_timeout_s: Annotated[float | None, typer.Option(help="openai-http: seconds without a byte from it.")] = None,
    chat_tokens: Annotated[int | None, typer.Option(help="scripted: tokens of an answer without max_tokens.")] = None,
    prefill_chunk: Annotated[int | None, typer.Option(help="scripted: prompt tokens a step, at most.")] = None,
    fail_after_tokens: Annotated[int | None, typer.Option(help="scripted: break each answer there.")] = None,
    fail_start: Annotated[bool | None, typer.Option("--fail-start", help="scripted: do not start.")] = None,
) -> int:
    """Run one LLM service: vLLM in this process, a running OpenAI-speaking server, or the scripted engine.

    It registers itself, serves gRPC, and leaves on SIGTERM after finishing what is running.

    Examples:
        infermesh llm --engine vllm --model qwen2.5-7b --source Qwen/Qwen2.5-7B-Instruct --registry consul://10.0.0.5:8500
        infermesh llm --engine vllm --model chat --source ./model --tp 4 --engine-arg enable_prefix_caching=true
        infermesh llm --engine openai-http --model qwen --source http://10.0.0.7:11434 --registry mesh://10.0.0.5:50049
        infermesh llm --engine scripted --model demo --prefill-tps 4300 --step-ms 27 --kv-tokens 468000
    """
    settings = settings_of({name: value for name, value in locals().items() if value is not None})
    import asyncio

    from services.llm.app import run

    return asyncio.run(run(settings))


def settings_of(given: dict[str, Any]) -> LlmSettings:
    """Settings from the options that were given; what was not keeps the default of the settings themselves.

    Raises:
        ValueError: all faults at once, a line each.
    """
    from services.llm.settings import LlmSettings

    given = dict(given)
    if (aliases := given.pop("alias", None)) is not None:
        given["aliases"] = tuple(aliases)
    if (context := given.pop("context", None)) is not None:
        given["context"] = _range(context)
    if (pairs := given.pop("engine_arg", None)) is not None:
        given["engine_args"] = dict(map(_pair, pairs))
    if (path := given.get("prompt_template")) is not None:
        given["prompt_template"] = _document(path)
    groups = {"speed": SPEED, "vllm": VLLM, "openai_http": OPENAI_HTTP, "scripted": SCRIPTED}
    for group, names in groups.items():
        options = {name: given.pop(name) for name in names if name in given}
        if options:
            given[group] = options
    if "max_context" in given:
        given.setdefault(str(given["engine"]).replace("-", "_"), {})["max_context"] = given.pop("max_context")
    return LlmSettings(**given)


def _range(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if not (dash and low.isdecimal() and high.isdecimal()):
        raise ValueError(f"context: {text!r} is not MIN-MAX, e.g. 0-16384")
    return int(low), int(high)


def _pair(text: str) -> tuple[str, Any]:
    import json

    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ValueError(f"engine-arg: {text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _document(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"prompt-template: {path}: {error}") from None
