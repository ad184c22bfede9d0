"""From a fleet to the commands that start it. Pure: what is on this host comes in as an argument."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from deploy.fleet import Fault, Fleet, Instance, Model
from deploy.fleet.tls import Certificate

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # ours -> vLLM's
# Of our own variables a child inherits only these: an INFERMESH_LISTEN meant for one must not reach all of them.
INHERITED = ("INFERMESH_OFFLINE", "INFERMESH_DEBUG", "INFERMESH_ACCELERATOR")
NO_SPEED: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Host:
    """This host: its interpreters by kind, its visible GPUs, and the environment of `up`. `llm` is empty where vLLM is
    not installed.
    """

    python: str
    llm: str
    gpus: int
    environ: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate and its key as a process sees them; `ca` vouches for it, and it is for `name`."""

    cert: str
    key: str
    ca: str
    name: str


def tls_files(certificate: Certificate, folder: str = "") -> TlsFiles:
    """`folder`: where a process finds what the fleet file has in its own folder."""
    crt, key, ca = (str(Path(folder or certificate.folder) / name) for name in ("tls.crt", "tls.key", "ca.crt"))
    return TlsFiles(crt, key, ca, certificate.name)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all children are told alike. Empty = not told."""

    registry: str
    keys: str = ""
    operator_key_file: str = ""
    insecure: bool = False
    grace_s: float = 10.0
    log_level: str = ""
    otlp: str = ""
    otlp_ratio: float = 1.0
    calibration: str = ""  # file of measured speeds
    registry_options: Mapping[str, str] = field(default_factory=dict)  # of Consul: prefix, token and TLS files
    instances_tls: TlsFiles | None = None  # instances serve over TLS, and the gateway asks for that


@dataclass(frozen=True, slots=True)
class Command:
    """A child's command line. `files` are written before it starts."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[Path, str] = field(default_factory=dict)


def of_this_host(fleet: Fleet, node: str) -> tuple[Instance, ...]:
    """The instances to start here: those of `node`, or all of them where the file names one node at most.

    Raises:
        ValueError: it cannot be told which.
    """
    names = [item.name for item in fleet.nodes]
    if not node:
        if len(names) > 1:
            raise ValueError(f"the fleet has several nodes; say which one this host is: --node {' | '.join(names)}")
        return fleet.instances
    if node not in names:
        raise ValueError(f"--node {node!r} is not in the fleet; it has {', '.join(names) or 'no nodes'}")
    return tuple(item for item in fleet.instances if item.node == node)


def start_faults(fleet: Fleet, gpus: int = 0, *, ray: bool = False) -> Iterator[Fault]:
    """What the schema allows and the engines of this version, or this host, do not take. `ray`: instances may span
    hosts.
    """
    if not fleet.instances:
        yield Fault("instances", "none is given; `infermesh plan FLEET.yaml -o completed.yaml` fills them in")
    greedy = [item for item in fleet.instances if fleet.engine_of(item) == "vllm" and not item.cards]
    for index, instance in enumerate(fleet.instances):
        if gpus > 1 and instance in greedy and len(greedy) > 1:
            yield Fault(f"instances[{index}].cards", f"say which of the {gpus} GPUs each vLLM instance gets")
        model, engine, at = fleet.model(instance.model), fleet.engine_of(instance), f"instances[{index}]"
        where = f"models[{fleet.models.index(model)}]"
        if engine in ("vllm", "sentence-transformers") and not model.source:
            yield Fault(f"{where}.source", f"engine {engine} of {instance.id} needs a hub name or a local folder")
        node = next((node for node in fleet.nodes if node.name == instance.node), None)
        if not ray and node and node.count and (instance.tp or 1) * instance.pp > node.count:
            yield Fault(f"{at}.pp", f"spans hosts ({node.name} has {node.count} cards), which needs Ray: `up --ray`")
        if engine == "vllm" and model.dtype in ("int8", "int4") and not instance.quantization:
            yield Fault(f"{at}.quantization", f"dtype {model.dtype} needs it: awq, gptq … as the weights are")
        if engine == "sentence-transformers":
            if model.dtype not in ("auto", *DTYPES):
                yield Fault(f"{where}.dtype", f"{engine} takes auto, {', '.join(DTYPES)}")
            for key in ("context", "kv_tokens"):
                if getattr(instance, key) is not None:
                    yield Fault(f"{at}.{key}", "is for LLMs")
        if engine in ("scripted", "openai-http"):
            # What weights an adopted server has loaded is described here, for the planner; it is not ours to set.
            described = ("dtype",) if engine == "scripted" else ()
            for key in (*described, "revision", "chat_template", "prompt_template", "tool_parser", "reasoning_parser"):
                if getattr(model, key) != Model.model_fields[key].get_default():
                    yield Fault(f"{where}.{key}", f"engine {engine} of {instance.id} does not take it")


def gateway_command(
    fleet: Fleet,
    host: Host,
    shared: Shared,
    *,
    grpc: str,
    http: str,
    ready_file: Path,
    tls: tuple[str, str] | None = None,
) -> Command:
    """`tls`: the files of the certificate and of its key, with which both doors serve."""
    argv = [host.python, "-P", "-m", "infermesh.cli", "gateway", "--grpc", grpc, "--http", http]
    if tls is not None:
        argv += ["--tls-cert-file", tls[0], "--tls-key-file", tls[1]]
    if inside := shared.instances_tls:
        argv += ["--instances-ca-file", inside.ca, "--instances-tls-name", inside.name]
    argv += [*_routing(fleet), *_shared(shared), "--ready-file", str(ready_file)]
    return Command(tuple(argv), _environ(host))


def _routing(fleet: Fleet) -> Iterator[str]:
    """The fleet's routing as the gateway's options."""
    routing, objective = fleet.routing, fleet.routing.objective
    for model in fleet.models:
        if model.fallback:
            yield from ("--fallback", f"{model.id}={model.fallback}")
    for name, variants in routing.aliases.items():
        yield from ("--alias", f"{name}={','.join(f'{item.model}:{item.weight!r}' for item in variants)}")
    for device, share in routing.split.items():
        yield from ("--split", f"{device}={share!r}")
    for instance in fleet.instances:
        if rule := instance.telemetry:
            name = f"{rule.instance_id or instance.id},{rule.model_id}".rstrip(",")
            yield from ("--telemetry", f"{instance.id}={name if rule.enable else 'off'}")
    for option, value in (("ttft-s", objective and objective.ttft_s), ("tpot-ms", objective and objective.tpot_ms)):
        if value:
            yield from (f"--objective-{option}", repr(value))


def instance_command(
    fleet: Fleet,
    instance: Instance,
    host: Host,
    shared: Shared,
    ready_file: Path,
    reckoned: Mapping[str, float] = NO_SPEED,
) -> Command:
    """One instance's command. `reckoned`: the planner's speed, for an LLM of which the file gives none; embedding and
    rerank services measure themselves at start.

    Raises:
        ValueError: its interpreter is not there.
    """
    model, engine = fleet.model(instance.model), fleet.engine_of(instance)
    python = instance.python or (host.llm if engine == "vllm" else host.python)
    if not python:
        raise ValueError(
            f"{instance.id}: vLLM is not installed; run `make setup`, or name an interpreter with `python:`"
        )
    files: dict[Path, str] = {}
    options: dict[str, object] = {
        "instance-id": instance.id,
        "model": model.id,
        "listen": instance.listen,
        "advertise": instance.advertise,
        "tier": instance.tier,
        "weight": instance.weight,
        "zone": next((node.zone for node in fleet.nodes if node.name == instance.node), ""),
        "device": next((node.device for node in fleet.nodes if node.name == instance.node), ""),
        "max-running": instance.max_running,
        "alias": model.aliases,
    }
    speed = instance.speed.model_dump() if instance.speed else {}
    if not instance.speed and reckoned and model.kind == "llm":
        speed, options["speed-source"] = dict(reckoned), "catalogue"
    for key, value in speed.items():
        options[key.replace("_", "-")] = value
    if model.kind == "llm":
        options |= _llm(model, instance, engine, host, ready_file, files)
    else:
        options |= _encoder(model, instance)
    argv = [python, "-P", "-m", "infermesh.cli", model.kind]
    for name, value in options.items():
        for item in value if isinstance(value, tuple) else (value,):
            if item not in (None, ""):
                argv += [f"--{name}", str(item)]
    if shared.calibration:
        argv += ["--calibration", shared.calibration]
    if inside := shared.instances_tls:
        argv += ["--tls-cert-file", inside.cert, "--tls-key-file", inside.key]
    argv += [*_shared(shared), "--ready-file", str(ready_file)]
    cards = ",".join(map(str, instance.cards))
    visible = {"CUDA_VISIBLE_DEVICES": cards} if engine == "vllm" and cards else {}
    return Command(tuple(argv), {**_environ(host), **visible, **instance.environment}, files)


def _llm(
    model: Model, instance: Instance, engine: str, host: Host, ready_file: Path, files: dict[Path, str]
) -> dict[str, object]:
    low, high = instance.context or (None, None)
    options: dict[str, object] = {
        "engine": engine,
        "source": instance.url or model.source if engine == "openai-http" else model.source,
        "context": None if low is None else f"{low}-{high}",
        "max-context": model.max_context or None,
        "kv-tokens": instance.kv_tokens,
    }
    if engine == "openai-http":
        return {**options, "upstream-model": instance.upstream_model, "api-key-file": instance.api_key_file}
    if engine == "scripted":
        return {**options, "source": None}
    if model.prompt_template:
        path = ready_file.with_suffix(".prompt.json")
        files[path] = json.dumps(model.prompt_template.model_dump())
        options["prompt-template"] = str(path)
    arguments = ({"revision": model.revision} if model.revision else {}) | instance.engine_args
    return {
        **options,
        "tp": instance.tp or len(instance.cards) // instance.pp or max(1, host.gpus // instance.pp),
        "pp": instance.pp,
        "vram-ratio": instance.vram_ratio,
        "kv-cache-dtype": instance.kv_cache_dtype,
        "quantization": instance.quantization or ("fp8" if model.dtype == "fp8" else ""),
        "dtype": DTYPES.get(model.dtype),
        "chat-template": model.chat_template,
        "tool-parser": model.tool_parser,
        "reasoning-parser": model.reasoning_parser,
        "engine-arg": tuple(f"{name}={json.dumps(value)}" for name, value in arguments.items()),
    }


def _encoder(model: Model, instance: Instance) -> dict[str, object]:
    return {
        "source": model.source,
        "revision": model.revision,
        "devices": ",".join(f"cuda:{card}" for card in instance.cards),
        "replicas": instance.replicas,
        "backend": instance.backend,
        "dtype": model.dtype,
        "max-tokens": model.max_context or None,
        "scorer": model.scorer if model.kind == "rerank" else None,
    }


def _shared(shared: Shared) -> list[str]:
    argv = ["--registry", shared.registry, "--grace-s", f"{shared.grace_s:g}"]
    for name, value in shared.registry_options.items():
        argv += [f"--registry-{name}", value]
    if shared.otlp:
        argv += ["--otlp", shared.otlp, "--otlp-ratio", f"{shared.otlp_ratio:g}"]
    if shared.log_level:
        argv += ["--log-level", shared.log_level]
    if shared.keys:
        argv += ["--keys", shared.keys]
    if shared.operator_key_file:
        argv += ["--operator-key-file", shared.operator_key_file]
    return [*argv, "--insecure"] if shared.insecure else argv


def _environ(host: Host) -> dict[str, str]:
    return {key: value for key, value in host.environ.items() if not key.startswith("INFERMESH_") or key in INHERITED}
