"""The values of a fleet file. Comments give units; what is `Later` has its place and is not served yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deploy.fleet.tls import Tls

Kind = Literal["llm", "embedding", "rerank"]
Engine = Literal["vllm", "openai-http", "scripted", "sentence-transformers"]
ENGINES_OF: dict[str, tuple[str, ...]] = {
    "llm": ("vllm", "openai-http", "scripted"),
    "embedding": ("sentence-transformers",),
    "rerank": ("sentence-transformers",),
}
Id = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.:/@-]{0,127}$")]
InstanceId = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.:-]{0,127}$")]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Share = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=4096)]


@dataclass(frozen=True, slots=True)
class Later:
    """Marks a key whose feature is not there yet; `what` says which one it waits for. `but`: who serves it already, of
    compose, k8s (`infermesh render`) and ray."""

    what: str
    but: tuple[str, ...] = ()


ONE_HOST = "processes of one host do not scale; Ray (`up --ray`) and `render k8s` do"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(Part):
    """What the planner reckons with where no config.json can be read."""

    parameters: Positive
    layers: Count
    hidden_size: Annotated[int, Field(ge=1)]
    heads: Count
    kv_heads: Count | None = None  # default: as many as heads
    head_dim: Annotated[int, Field(ge=1)] | None = None  # default: hidden_size / heads
    max_context: Annotated[int, Field(ge=1)]
    intermediate_size: Annotated[int, Field(ge=1)] | None = None
    vocabulary: Annotated[int, Field(ge=1)] | None = None
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    kv_lora_rank: Annotated[int, Field(ge=1)] | None = None  # MLA: width of the cached latent vector
    rope_head_dim: Annotated[int, Field(ge=1)] | None = None  # MLA: cached beside it
    active_parameters: Positive | None = None  # of a mixture of experts: those that one token uses


class PromptTemplate(Part):
    """A prompt in four parts. `{}` takes the current time in `sys`, the message in `user` and `ai`."""

    sys: str = ""
    user: str
    ai: str
    sep: str = ""


class Model(Part):
    """A model that clients ask for by its id."""

    id: Id
    kind: Kind
    source: str = ""  # a hub name, or a folder seen from where `up` is called; for openai-http the server's URL
    revision: str = ""  # of a hub model: a commit, tag or branch
    architecture: Architecture | None = None  # for `infermesh plan` and `sim`, where `source` cannot be read
    dtype: Literal["auto", "fp32", "fp16", "bf16", "fp8", "int8", "int4"] = "auto"
    aliases: tuple[Id, ...] = ()
    fallback: Id | None = None  # served instead, under pressure and where a request allows it
    max_context: Annotated[int, Field(ge=0, le=1 << 31)] = 0  # tokens, prompt + answer; 0 = as the model says
    chat_template: str = ""  # a Jinja file; excludes prompt_template
    prompt_template: PromptTemplate | None = None
    tool_parser: str = ""  # vLLM's name for it
    reasoning_parser: str = ""
    scorer: Literal["auto", "cross-encoder", "bi-encoder"] = "auto"  # rerank
    lora: Annotated[dict[str, str], Later("LoRA adapters are not served yet")] = {}


class Node(Part):
    """A host and its cards."""

    name: InstanceId
    device: str = ""  # a name of the hardware catalogue, e.g. A800-80G; empty = detected
    count: Annotated[int, Field(ge=0, le=4096)] = 0  # cards; 0 = not told
    zone: Annotated[str, Field(max_length=64)] = ""
    interconnect: Literal["", "nvlink", "pcie"] = ""  # described for the planner; it changes nothing at start
    network: Literal["", "rdma", "ethernet"] = ""  # the same, between hosts
    address: str = ""  # for what is dialled there: other hosts' Compose projects, llama.cpp's servers and workers
    memory_gib: Positive | None = None  # of the host, for the planner
    cpus: Positive | None = None  # cores of the host, for the planner


class Speed(Part):
    """The operator's numbers; they win over what is measured. Units as in registry/endpoint.py."""

    prefill_tps: Positive | None = None
    prefill_doubling_ctx: Positive | None = None
    step_ms: Positive | None = None
    kv_us_per_ktoken: Annotated[float, Field(ge=0, le=1e9)] | None = None
    fixed_ms: Annotated[float, Field(ge=0, le=1e6)] | None = None
    tokens_per_s: Positive | None = None


class Resources(Part):
    cpus: Positive | None = None
    memory_gib: Positive | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None


class Storage(Part):
    size_gib: Positive
    storage_class: str = ""
    access_mode: Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"] = "ReadWriteOnce"


class Telemetry(Part):
    """What callers are told of who answered. `enable: false` hides it; empty names are the instance's own."""

    enable: bool = True
    instance_id: Annotated[str, Field(pattern=r"^[\x21-\x2b\x2d-\x7e]{0,128}$")] = ""  # no space, no comma
    model_id: Annotated[str, Field(pattern=r"^[\x21-\x2b\x2d-\x7e]{0,256}$")] = ""


def _text(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


Text = Annotated[str, BeforeValidator(_text)]


class Instance(Part):
    """One model service: one process with one address (an LLM with `replicas` is so many of them)."""

    id: InstanceId
    model: Id
    node: str = ""
    engine: Engine | None = None  # default: vllm, sentence-transformers
    listen: str = "127.0.0.1:0"  # port 0 = any free one
    advertise: str = ""
    url: str = ""  # openai-http: the running server, where it is not the model's source
    upstream_model: str = ""  # openai-http: the server's own name for the model
    api_key_file: str = ""  # openai-http
    tp: Count | None = None  # vllm; default: the cards given, else the visible GPUs
    pp: Count = 1
    cards: tuple[Annotated[int, Field(ge=0, le=4095)], ...] = ()  # indices of the node's GPUs
    replicas: Count = 1  # embedding, rerank: worker processes a card behind one address
    tier: Literal["primary", "long-context", "fallback"] = "primary"
    context: tuple[int, int] | None = None  # tokens of prompt + answer served here: [min, max]
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    speed: Speed | None = None
    kv_tokens: Annotated[int, Field(ge=0)] | None = None
    max_running: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    vram_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_cache_dtype: str = ""
    quantization: str = ""
    engine_args: dict[str, Any] = {}  # any further argument of the engine
    backend: Literal["auto", "torch", "onnx", "openvino"] = "auto"  # embedding, rerank
    python: str = ""  # its interpreter; default: .venv-llm for vllm, else the one of `up`
    environment: dict[str, Text] = {}
    telemetry: Telemetry | None = None
    min: Annotated[Count | None, Later(ONE_HOST, ("k8s", "ray"))] = None  # replicas, each an instance like this one
    max: Annotated[Count | None, Later(ONE_HOST, ("k8s", "ray"))] = None
    # Of its container or pod, for `infermesh render`; a process that `up` starts takes what its host has.
    resources: Resources | None = None
    storage: Storage | None = None  # for model files; absent: a shared volume (compose), an emptyDir (k8s)
    image: str = ""
    labels: dict[str, Text] = {}
    ray_cluster: Annotated[str | int | None, Later("it is for Ray: rayClusters, or `up --ray`", ("k8s", "ray"))] = None


class Device(Part):
    """A card that the catalogue lacks, or a correction of one."""

    memory_mib: Positive | None = None
    bandwidth_gbs: Positive | None = None
    tflops: dict[Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"], Positive] = {}
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")] | None = None
    nvlink_gbs: Positive | None = None  # to all neighbours, both directions
    engines: tuple[Engine, ...] = ()


class Objective(Part):
    """What a good answer is: `ttft_s` is also when requests that may go to their model's fallback do."""

    ttft_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    tpot_ms: Annotated[float, Field(gt=0, le=86_400_000)] | None = None


class Variant(Part):
    """One of the models behind a weighted alias."""

    model: Id
    weight: Share = 1.0


class Routing(Part):
    """`split`: a node's device -> share of tokens while requests wait. `aliases`: a name and the models behind it, by
    weight, the same one for all of a session."""

    objective: Objective | None = None
    split: dict[Annotated[str, Field(pattern=r"^[^=,\s][^=,]{0,127}$")], Share] = {}
    aliases: dict[Id, Annotated[tuple[Variant, ...], Field(min_length=1, max_length=64)]] = {}


class Gateway(Part):
    """Where the gateway listens and whom it lets in. `up`'s own options win."""

    grpc: str = "127.0.0.1:50050"
    http: str = "127.0.0.1:8000"
    keys: str = ""
    operator_key_file: str = ""
    insecure: bool = False
    otlp: str = ""  # OTLP/gRPC endpoint for the spans of all processes, e.g. http://127.0.0.1:4317
    otlp_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0  # of the traces that begin here
    workers: Annotated[Count, Later("several gateway processes on one port are not there yet")] = 1


class Traffic(Part):
    """What the planner plans for."""

    requests_per_s: Positive
    prompt_tokens: Positive
    output_tokens: Positive
    slm_per_llm: Positive | None = None  # embedding and rerank requests for each LLM request
    slm_tokens: Positive | None = None  # of one of them
    long_prompt_tokens: Positive | None = None  # of the long requests, where there are any
    long_share: Annotated[float, Field(ge=0, le=0.9)] = 0.0  # of all requests


class Expect(Part):
    """What somebody promised; `infermesh plan` says which of it holds."""

    ttft_s: Positive | None = None  # of a mean prompt, nothing cached
    concurrent: Positive | None = None  # requests of mean length on one primary instance
    card_tokens_per_s: Positive | None = None  # generated, per LLM card, at full load
    requests_per_day: Positive | None = None


class RayCluster(Part):
    """Where instances run that choose it by `ray_cluster`: its name, or its index here; the first one by default."""

    name: InstanceId
    headAddress: str  # HOST:PORT of the head, e.g. 10.0.0.5:6379
    pythonVersion: str = ""  # of the cluster; checked before anything is placed


class Fleet(Part):
    """A fleet file."""

    version: Literal[1]
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    nodes: tuple[Node, ...] = ()
    instances: tuple[Instance, ...] = ()
    registry: Annotated[str, Field(pattern=r"^((mesh|consuls?)://\S+)?$")] = ""  # default: the one that `up` hosts
    gateway: Gateway = Gateway()
    tls: Tls = Tls()
    routing: Routing = Routing()
    devices: dict[str, Device] = {}  # cards that the hardware catalogue lacks, or corrections
    calibration: str = ""  # file of measured speeds; default: .infermesh/calibration.yaml
    traffic: Traffic | None = None  # for the planner
    expect: Expect | None = None  # for the planner
    rayClusters: Annotated[tuple[RayCluster, ...], Later("it is for Ray: `infermesh up`", ("k8s", "ray"))] = ()

    def model(self, id: str) -> Model:
        return next(model for model in self.models if model.id == id)

    def engine_of(self, instance: Instance) -> str:
        return instance.engine or ENGINES_OF[self.model(instance.model).kind][0]
