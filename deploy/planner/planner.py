"""`infermesh plan`: from models, nodes and traffic to instances, with the reasons.

Instances that the file has are kept and completed; models without any are placed on the cards that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from deploy.fleet import Fault, Fleet, FleetError, Model
from deploy.planner.advice import what_is_short, why_nowhere
from deploy.planner.architecture import architecture_of_shape, dtype_of
from deploy.planner.catalogue import Catalogue
from deploy.planner.claims import claims
from deploy.planner.cpu import cpu_remarks
from deploy.planner.demand import load, most
from deploy.planner.estimate import Estimate, estimate, instance_faults
from deploy.planner.hosts import Host, hosts_of, node_faults
from deploy.planner.layout import lacking
from deploy.planner.place_encoder import place_encoders
from deploy.planner.place_llm import Found, place_fallback, place_primary
from deploy.planner.place_wide import no_gguf, place_gguf, place_over_hosts
from deploy.planner.placed import Placed, Plan, Tier
from deploy.planner.shape import Shape
from deploy.planner.wanted import Wanted, wanted_of


def plan(fleet: Fleet, shapes: Mapping[str, Shape], catalogue: Catalogue, unread: Mapping[str, str], name: str) -> Plan:
    """`shapes`: model id -> shape, `unread`: model id -> why there is none, both from deploy/model_files.

    Raises:
        FleetError: everything that keeps the file from being planned, a model that fits nowhere included.
    """
    devices = {name: device.model_dump() for name, device in fleet.devices.items()}
    catalogue, faulty = catalogue.with_devices(devices)
    faults = [Fault(path, why) for path, why in faulty]
    faults += node_faults(fleet, catalogue)
    for index, model in enumerate(fleet.models):
        if model.id in unread:
            faults.append(Fault(f"models[{index}].source", unread[model.id]))
    if not fleet.nodes:
        faults.append(Fault("nodes", "none is given; plan needs the hosts, their cards and how many"))
    known = {node.name for node in fleet.nodes if node.device in catalogue.cards and (node.count or node.memory_gib)}
    hosts = [host for host in hosts_of(fleet, catalogue) if host.node.name in known]
    faults += instance_faults(fleet, shapes, {host.node.name: host for host in hosts})
    wanted = wanted_of(fleet)
    found = Found(hosts, shapes)
    found.placed += _kept(fleet, shapes, hosts, wanted)
    found.tiers += _tiers(found.placed, wanted)
    blocked = bool(faults)
    for fault in _place(fleet, shapes, catalogue, found, wanted):
        # A model may fit nowhere only because a node could not be read; then the node's fault says enough.
        if not blocked or not any(fault.path.startswith("nodes") for fault in faults):
            faults.append(fault)
    if faults:
        raise FleetError(name, faults)
    found.remarks += _unused(fleet, shapes, found, wanted)
    lines = what_is_short(found.tiers, shapes, hosts, wanted)
    return Plan(
        fleet=_completed(fleet, shapes, found),
        placed=tuple(found.placed),
        tiers=tuple(found.tiers),
        short=tuple([*found.short, *lines]),
        claims=tuple(claims(fleet, found.placed, shapes, wanted)),
        remarks=tuple([*wanted.remarks, *found.remarks, *cpu_remarks(found.placed, shapes, hosts)]),
    )


def _place(
    fleet: Fleet, shapes: Mapping[str, Shape], catalogue: Catalogue, found: Found, wanted: Wanted
) -> Iterator[Fault]:
    """Primary models first, then encoders, then fallback models on what is left; an encoder leaves the oldest class to
    the fallback model where there are two classes of old cards."""
    have = {instance.model for instance in fleet.instances}
    spares = {model.fallback for model in fleet.models if model.fallback}
    missing = [(i, model) for i, model in enumerate(fleet.models) if model.id not in have and model.id in shapes]
    primary = [(i, model) for i, model in missing if model.kind == "llm" and model.id not in spares]
    spare = [(i, model) for i, model in missing if model.kind == "llm" and model.id in spares]
    encoders = [(model, shapes[model.id]) for _, model in missing if model.kind != "llm"]
    wanted = _shared(wanted, len(primary), found)
    for index, model in primary:
        if not _primary(model, shapes[model.id], found, wanted):
            yield Fault(f"models[{index}]", _nowhere(model, shapes[model.id], found, wanted, catalogue))
    oldest = _oldest(found) if spare else []
    for model in place_encoders(encoders, found, wanted, oldest):
        index = fleet.models.index(model)
        shape = shapes[model.id]
        yield Fault(
            f"models[{index}]",
            f"fits nowhere: {shape.parameters / 1e9:.2f} B parameters; no card is free and none leaves room beside its "
            "LLM. Ways out: a V100- or T4-class card, a CPU node (device CPU-AVX512), or fewer LLM instances",
        )
    for index, model in spare:
        shape = shapes[model.id]
        if shape.gguf:
            done = place_gguf(model, shape, found, wanted, "fallback")
        else:
            done = place_fallback(model, shape, dtype_of(model, shape), found, wanted)
        if not done and not any(host.free for host in found.hosts):
            found.short.append(f"{model.id}: no card is left for the fallback model; degrading to it cannot work")
        elif not done:
            yield Fault(f"models[{index}]", _nowhere(model, shape, found, wanted, catalogue))


def _nowhere(model: Model, shape: Shape, found: Found, wanted: Wanted, catalogue: Catalogue) -> str:
    if shape.gguf:
        return no_gguf(model, shape, found, wanted)
    return why_nowhere(shape, dtype_of(model, shape), found.hosts, wanted, catalogue)


def _primary(model: Model, shape: Shape, found: Found, wanted: Wanted) -> bool:
    if shape.gguf:
        return place_gguf(model, shape, found, wanted, "primary")
    dtype = dtype_of(model, shape)
    return place_primary(model, shape, dtype, found, wanted) or place_over_hosts(model, shape, dtype, found, wanted)


def _shared(wanted: Wanted, models: int, found: Found) -> Wanted:
    """Several LLMs share the traffic evenly: the file tells no more."""
    if models < 2:
        return wanted
    found.remarks.append(f"{models} LLMs without instances: the traffic is shared evenly between them")
    short = replace(wanted.short, rate=wanted.short.rate / models)
    long = replace(wanted.long, rate=wanted.long.rate / models) if wanted.long else None
    return replace(wanted, short=short, long=long)


def _unused(fleet: Fleet, shapes: Mapping[str, Shape], found: Found, wanted: Wanted) -> Iterator[str]:
    """Hosts with cards that nothing was put on, and why the first LLM was not."""
    shape = next((shapes[model.id] for model in fleet.models if model.kind == "llm" and model.id in shapes), None)
    for host in found.hosts:
        if host.free and not host.card.cpu:
            model = next((model for model in fleet.models if model.kind == "llm"), None)
            why = lacking(shape, dtype_of(model, shape), host, wanted.short.length) if shape and model else ""
            yield f"{host.node.name}: {len(host.free)} {host.card.name} are not used" + (f" ({why})" if why else "")


def _oldest(found: Found) -> list[str]:
    """The oldest class of free GPUs."""
    free = [host.card for host in found.hosts if host.free and not host.card.cpu]
    keys = [card.generation.key for card in free if card.generation.key[0].isdigit()]
    return list({card.name for card in free if keys and card.generation.key == min(keys, key=float)})


def _kept(fleet: Fleet, shapes: Mapping[str, Shape], hosts: list[Host], wanted: Wanted) -> Iterator[Placed]:
    """The file's own instances, with the numbers that it leaves out."""
    by_name = {host.node.name: host for host in hosts}
    for instance in fleet.instances:
        shape, host = shapes.get(instance.model), by_name.get(instance.node)
        found = Placed(instance, ("given in the file",), Estimate())
        if shape and host and fleet.engine_of(instance) != "scripted":
            known = estimate(fleet, instance, shape, host)
            demand = wanted.long if instance.tier == "long-context" and wanted.long else wanted.short
            found = replace(found, estimate=known)
            if known.speed and known.memory:
                idle = load(known.speed, demand, 0.0)
                rate = most(known.speed, demand, known.memory.kv_tokens.value // demand.length)
                found = replace(found, rate=rate, ttft_s=idle.ttft_s if idle else None)
                found = replace(found, tpot_ms=idle.tpot_ms if idle else None)
        yield found


def _tiers(kept: Sequence[Placed], wanted: Wanted) -> Iterator[Tier]:
    """What the file's own LLM instances take together, by model and tier."""
    together: dict[tuple[str, str], list[Placed]] = {}
    for one in kept:
        if one.estimate.speed:
            together.setdefault((one.instance.model, one.instance.tier), []).append(one)
    for (model, tier), alike in together.items():
        demand = wanted.long if tier == "long-context" and wanted.long else wanted.short
        asked = 0.0 if tier == "fallback" else demand.rate
        capacity = sum(one.rate for one in alike)
        lead = max(alike, key=lambda one: one.rate)
        seen = None
        if lead.estimate.speed and capacity:
            seen = load(lead.estimate.speed, demand, min(demand.rate, capacity) * lead.rate / capacity)
        yield Tier(model, tier, asked, capacity, seen.ttft_s if seen else None, seen.tpot_ms if seen else None)


def _completed(fleet: Fleet, shapes: Mapping[str, Shape], found: Found) -> Fleet:
    models = []
    for model in fleet.models:
        shape = shapes.get(model.id)
        told = {"architecture": architecture_of_shape(shape)} if shape and not model.architecture else {}
        models.append(model.model_copy(update=told))
    return fleet.model_copy(update={"models": tuple(models), "instances": tuple(one.instance for one in found.placed)})
