"""What an instance of a fleet file will need and do: for `plan` where the file has it already, for `sim` and `up` where
neither `speed` nor a calibration is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from deploy.fleet import Fault, Fleet, Instance
from deploy.planner.architecture import dtype_of, shape_of_architecture
from deploy.planner.catalogue import GIB, Catalogue
from deploy.planner.hosts import Host, hosts_of
from deploy.planner.layout import dtype_on
from deploy.planner.memory import MAX_RUNNING, RATIO, Memory, Setup, encoder_memory, memory
from deploy.planner.roofline import EncoderSpeed, LlmSpeed, encoder_speed, llm_speed
from deploy.planner.shape import Shape, tp_fault
from deploy.planner.traced import Traced

CPU_KV_GIB = "VLLM_CPU_KVCACHE_SPACE"  # vLLM's own variable


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one instance. LLMs have `memory` and `speed`, encoders `need` [bytes a process] and `pace`."""

    setup: Setup | None = None
    memory: Memory | None = None
    speed: LlmSpeed | None = None
    need: Traced | None = None
    pace: EncoderSpeed | None = None
    calibrated: bool = False  # speed or pace was measured

    def speed_values(self) -> dict[str, float]:
        """Under the names of the fleet file's `speed:`."""
        if self.speed:
            found = self.speed
            numbers = (found.prefill_tps, found.doubling, found.step_ms, found.kv_us_per_ktoken)
            names = ("prefill_tps", "prefill_doubling_ctx", "step_ms", "kv_us_per_ktoken")
            if self.calibrated:
                return {name: value.value for name, value in zip(names, numbers, strict=True)}
            return {name: _three(value.value) for name, value in zip(names, numbers, strict=True)}
        if self.pace:
            return {"fixed_ms": self.pace.fixed_ms.value, "tokens_per_s": _three(self.pace.tokens_per_s.value)}
        return {}


def inline_shapes(fleet: Fleet) -> dict[str, Shape]:
    """Of the models that describe themselves in the file."""
    return {model.id: shape_of_architecture(model, model.architecture) for model in fleet.models if model.architecture}


def estimates(fleet: Fleet, shapes: Mapping[str, Shape], catalogue: Catalogue) -> dict[str, Estimate]:
    """Instance id -> estimate, for those whose card and model are known and whose engine runs a model."""
    catalogue, _ = catalogue.with_devices({name: device.model_dump() for name, device in fleet.devices.items()})
    hosts = {host.node.name: host for host in hosts_of(fleet, catalogue)}
    found = {}
    for instance in fleet.instances:
        shape, host = shapes.get(instance.model), hosts.get(instance.node)
        if shape and host and fleet.engine_of(instance) != "scripted":
            found[instance.id] = estimate(fleet, instance, shape, host)
    return found


def estimate(fleet: Fleet, instance: Instance, shape: Shape, host: Host) -> Estimate:
    """One instance on its host's cards. A dtype that the card cannot load is taken at the card's own 16 bits."""
    model, engine = fleet.model(instance.model), fleet.engine_of(instance)
    told = dtype_of(model, shape)
    if model.kind != "llm":
        dtype = told if told in ("fp32", "fp16", "bf16") else "fp16"
        processes = max(1, len(instance.cards))
        return Estimate(need=encoder_memory(shape, dtype), pace=encoder_speed(shape, dtype, host.card, processes))
    dtype = instance.quantization if instance.quantization in ("int8", "fp8") else told
    if engine in host.card.generation.engines:
        dtype = dtype_on(host.card, engine, dtype)[0] or dtype
    setup = setup_of(fleet, instance, shape, dtype, engine)
    space = instance.environment.get(CPU_KV_GIB, "")
    if host.card.cpu and space.replace(".", "", 1).isdigit():
        sums = memory(shape, setup, host.card)
        used = sums.weights.value + sums.overhead.value + float(space) * GIB
        setup = replace(setup, ratio=used / host.card.memory)
    return Estimate(
        setup=setup,
        memory=memory(shape, setup, host.card),
        speed=llm_speed(shape, setup, host.card, nvlink=host.nvlink, network=_between(setup, host)),
    )


def setup_of(fleet: Fleet, instance: Instance, shape: Shape, dtype: str, engine: str) -> Setup:
    """How a given instance runs; a request is as long as the traffic says, else as its range allows."""
    traffic = fleet.traffic
    length = round(traffic.prompt_tokens + traffic.output_tokens) if traffic else 0
    high = instance.context[1] if instance.context else shape.max_context
    kv = instance.kv_cache_dtype
    return Setup(
        dtype=dtype,
        length=min(length or high, shape.max_context, high),
        tp=instance.tp or max(1, len(instance.cards) // instance.pp),
        pp=instance.pp,
        kv_dtype="fp8" if kv.startswith("fp8") else "fp16",
        ratio=instance.vram_ratio or RATIO,
        engine=engine,
        max_running=min(instance.max_running or MAX_RUNNING, 1024),
    )


def instance_faults(fleet: Fleet, shapes: Mapping[str, Shape], hosts: Mapping[str, Host]) -> Iterator[Fault]:
    """What cannot run as the file says, each with the sum."""
    for index, instance in enumerate(fleet.instances):
        at, shape, host = f"instances[{index}]", shapes.get(instance.model), hosts.get(instance.node)
        if fleet.model(instance.model).kind != "llm" or fleet.engine_of(instance) != "vllm" or not shape or not host:
            continue
        found = estimate(fleet, instance, shape, host)
        assert found.setup is not None and found.memory is not None
        if fault := tp_fault(shape, found.setup.tp, found.setup.dtype):
            yield Fault(f"{at}.tp", fault)
        if "vllm" not in host.card.generation.engines:
            engines = ", ".join(host.card.generation.engines)
            yield Fault(
                f"{at}.engine", f"vLLM does not run on {host.card.name} ({host.card.generation.sm}); {engines} do"
            )
        if found.memory.room.value < found.memory.kv_card.value:
            yield Fault(at, _sum(found.memory, found.setup, host))


def _sum(found: Memory, setup: Setup, host: Host) -> str:
    card = host.card.memory / GIB
    return (
        f"does not fit: {found.weights.value / GIB:.1f} GiB of weights + {found.overhead.value / GIB:.1f} GiB of "
        f"activations and runtime on each {host.card.name}, which has {card:.1f} GiB × {setup.ratio:g} = "
        f"{card * setup.ratio:.1f}; take more cards (tp), or int8 or int4 weights"
    )


def _between(setup: Setup, host: Host) -> str:
    """The network that pipeline stages talk over; empty inside a host."""
    if host.card.cpu or setup.cards <= host.node.count:
        return ""
    return host.node.network or "ethernet"


def _three(value: float) -> float:
    """Three significant digits: an estimate has no more."""
    return float(f"{value:.3g}")
