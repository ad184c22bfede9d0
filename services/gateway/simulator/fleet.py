"""A fleet file as the instances of a simulation, with the objective that goodput is measured by. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from deploy.fleet import Fleet, Instance
from deploy.planner.estimate import Estimate
from registry.endpoint import Capacity, Endpoint, Hardware, Speed
from services.gateway.routing import cost
from services.gateway.routing.policy import Variants
from services.gateway.routing.scaling import Between
from services.gateway.simulator.encoder import EncoderEngine
from services.gateway.simulator.engine import BUDGET, LlmEngine, Pace

# What is simulated where the file is silent: the router's own priors, and a middling card for what it has none for.
PRIOR_KV_TOKENS = 1 << 18
OBJECTIVE_TTFT_S = 2.0
OBJECTIVE_TPOT_MS = 80.0
NOTHING: Mapping[str, Estimate] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Site:
    """`models`: kind -> the model of requests that name none; `fallback`: model -> the one that may stand in.
    `aliases`: name -> weighted models. `split`: device -> share of tokens. `budget`: prompt tokens a step, by instance.
    `scale`: group -> how many replicas it may have; of each the file describes one. `remarks`: what was assumed."""

    endpoints: tuple[Endpoint, ...]
    models: dict[str, str]
    fallback: dict[str, str]
    split: dict[str, float]
    ttft_s: float
    tpot_ms: float
    aliases: dict[str, Variants] = field(default_factory=dict)
    budget: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    scale: dict[str, Between] = field(default_factory=dict)

    def staffed(self, counts: Mapping[str, int]) -> Site:
        """The site with so many replicas of each group, which stay."""
        endpoints: list[Endpoint] = []
        for endpoint in self.endpoints:
            count = counts.get(endpoint.group, 1) if endpoint.group else 0
            endpoints += [replica(endpoint, number) for number in range(count)] or [endpoint]
        return replace(self, endpoints=tuple(endpoints))


def replica(endpoint: Endpoint, number: int) -> Endpoint:
    """One of a group that the file describes once."""
    return replace(endpoint, id=f"{endpoint.group}-{number}")


def site_of(fleet: Fleet, planned: Mapping[str, Estimate] = NOTHING) -> Site:
    """What a fleet file describes. The instances' truth is what it says, else what the planner reckons (`planned`: by
    instance id), else it is assumed, and said."""
    spares = {model.fallback for model in fleet.models if model.fallback}
    models: dict[str, str] = {}
    for model in sorted(fleet.models, key=lambda model: model.id in spares):  # stable: the file's order otherwise
        models.setdefault(model.kind, model.id)
    remarks: list[str] = []
    budget = {}
    for instance in fleet.instances:
        told = instance.engine_args.get("max_num_batched_tokens")
        if isinstance(told, int) and told > 0:
            budget[instance.id] = told
    objective = fleet.routing.objective
    ttft_s = objective.ttft_s if objective else None
    tpot_ms = objective.tpot_ms if objective else None
    if objective is None:
        ttft_s, tpot_ms = OBJECTIVE_TTFT_S, OBJECTIVE_TPOT_MS
        remarks.append(f"routing.objective is absent: goodput means TTFT <= {ttft_s:g} s and TPOT <= {tpot_ms:g} ms")
    endpoints = tuple(
        _endpoint(fleet, instance, remarks, planned.get(instance.id, Estimate())) for instance in fleet.instances
    )
    if fleet.routing.split:
        remarks.append("routing.split binds infermesh alone: no peer's policy knows of it")
    return Site(
        endpoints=endpoints,
        models=models,
        fallback={model.id: model.fallback for model in fleet.models if model.fallback},
        split=dict(fleet.routing.split),
        ttft_s=ttft_s or float("inf"),
        tpot_ms=tpot_ms or float("inf"),
        aliases={
            name: tuple((item.model, item.weight) for item in variants)
            for name, variants in fleet.routing.aliases.items()
        },
        budget=budget,
        remarks=tuple(remarks),
        scale={item.id: Between(item.min or 1, max(item.min or 1, item.max)) for item in fleet.instances if item.max},
    )


def _endpoint(fleet: Fleet, instance: Instance, remarks: list[str], planned: Estimate) -> Endpoint:
    model = fleet.model(instance.model)
    node = next((node for node in fleet.nodes if node.name == instance.node), None)
    cards = len(instance.cards) or (instance.tp or 1) * instance.pp
    low, high = instance.context or (0, 0)
    if not high:
        high = model.max_context or (model.architecture.max_context if model.architecture else 0)
    return Endpoint(
        id=instance.id,
        kind=model.kind,
        host="127.0.0.1",
        port=1,
        model=model.id,
        incarnation=1,
        aliases=model.aliases,
        engine=fleet.engine_of(instance),
        dtype=model.dtype,
        hardware=Hardware(node.device if node else "", cards, tp=instance.tp or 1, pp=instance.pp),
        speed=_speed(instance, model.kind, remarks, planned),
        capacity=Capacity(
            context_min=low,
            context_max=high,
            max_running=instance.max_running or 0,
            kv_tokens=_kv_tokens(instance, model.kind, remarks, planned),
        ),
        tier=instance.tier,
        weight=instance.weight,
        zone=node.zone if node else "",
        group=instance.id if instance.max else "",
    )


def _speed(instance: Instance, kind: str, remarks: list[str], planned: Estimate) -> Speed:
    priors = (
        {
            "prefill_tps": cost.PRIOR_PREFILL_TPS,
            "prefill_doubling_ctx": cost.PRIOR_DOUBLING_CTX,
            "step_ms": cost.PRIOR_STEP_MS,
            "kv_us_per_ktoken": cost.PRIOR_KV_US_PER_KTOKEN,
        }
        if kind == "llm"
        else {"fixed_ms": cost.PRIOR_FIXED_MS, "tokens_per_s": cost.PRIOR_TOKENS_PER_S}
    )
    told = instance.speed.model_dump(exclude_none=True) if instance.speed else {}
    reckoned = planned.speed_values()
    missing = [name for name in priors if name not in told and name not in reckoned]
    if missing:
        assumed = ", ".join(f"{name} {priors[name]:g}" for name in missing)
        remarks.append(f"{instance.id}: speed is not told; assumed {assumed}")
    values = {name: float(told.get(name, reckoned.get(name, prior))) for name, prior in priors.items()}
    source = "declared" if told else "calibrated" if planned.calibrated else "catalogue" if reckoned else "prior"
    return Speed(**values, source=source)


def _kv_tokens(instance: Instance, kind: str, remarks: list[str], planned: Estimate) -> int:
    if kind != "llm":
        return 0
    known = instance.kv_tokens or (int(planned.memory.kv_tokens.value) if planned.memory else 0)
    if not known:
        remarks.append(f"{instance.id}: kv_tokens is not told; assumed {PRIOR_KV_TOKENS}")
    return known or PRIOR_KV_TOKENS


def engine_of(endpoint: Endpoint, block_tokens: int, budget: int = BUDGET) -> LlmEngine | EncoderEngine:
    """The engine that behaves as the endpoint says of itself. Every number of its speed is there."""
    speed, capacity = endpoint.speed, endpoint.capacity
    if endpoint.kind != "llm":
        return EncoderEngine(endpoint.id, (speed.fixed_ms or 0.0) / 1000, speed.tokens_per_s or cost.PRIOR_TOKENS_PER_S)
    pace = Pace(
        prefill_tps=speed.prefill_tps or cost.PRIOR_PREFILL_TPS,
        doubling=speed.prefill_doubling_ctx or cost.PRIOR_DOUBLING_CTX,
        step_s=(speed.step_ms or cost.PRIOR_STEP_MS) / 1000,
        kv_s=(speed.kv_us_per_ktoken or 0.0) / 1e9,
    )
    return LlmEngine(
        endpoint.id,
        pace,
        kv_tokens=capacity.kv_tokens or PRIOR_KV_TOKENS,
        block_tokens=block_tokens,
        max_running=capacity.max_running,
        context_max=capacity.context_max,
        budget=budget,
    )
