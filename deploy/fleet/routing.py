"""What a fleet file says of routing, held against its models and nodes. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.fleet.faults import Fault, hint, known
from deploy.fleet.values import Fleet


def routing_faults(fleet: Fleet) -> Iterator[Fault]:
    """Fallbacks, weighted aliases and the split."""
    yield from _fallback_faults(fleet)
    yield from _alias_faults(fleet)
    yield from _split_faults(fleet)


def _fallback_faults(fleet: Fleet) -> Iterator[Fault]:
    fallback = {model.id: model.fallback for model in fleet.models if model.fallback}
    for index, model in enumerate(fleet.models):
        at = f"models[{index}].fallback"
        if model.fallback is None:
            continue
        if model.fallback == model.id:
            yield Fault(at, "a model is no fallback of itself")
            continue
        yield from known(at, model.fallback, [m.id for m in fleet.models if m.kind == model.kind and m is not model])
        if circle := _circle(model.id, fallback):
            yield Fault(at, f"goes in a circle: {' -> '.join(circle)}")


def _circle(start: str, fallback: dict[str, str]) -> list[str]:
    """The way from a model back to itself, or nothing."""
    way = [start]
    while (other := fallback.get(way[-1])) is not None:
        if other in way:
            return [*way, other] if other == start else []  # another model's circle is told there
        way.append(other)
    return []


def _alias_faults(fleet: Fleet) -> Iterator[Fault]:
    kinds = {model.id: model.kind for model in fleet.models}
    plain = {alias: f"models[{i}].aliases" for i, model in enumerate(fleet.models) for alias in model.aliases}
    for name, variants in fleet.routing.aliases.items():
        at = f"routing.aliases.{name}"
        if name in kinds:
            yield Fault(at, f"{name!r} is a model's id")
        if name in plain:
            yield Fault(at, f"{name!r} is an alias already, at {plain[name]}")
        first = next((kinds[variant.model] for variant in variants if variant.model in kinds), None)
        told: set[str] = set()
        for index, variant in enumerate(variants):
            here, model = f"{at}[{index}].model", variant.model
            if model in fleet.routing.aliases or model in plain:
                yield Fault(here, f"{model!r} is an alias; name models by their ids")
            else:
                yield from known(here, model, list(kinds))
            if model in told:
                yield Fault(here, f"{model!r} is there already; one weight a model")
            if model in kinds and kinds[model] != first:
                yield Fault(here, f"{model!r} is of kind {kinds[model]}, the first one of kind {first}")
            told.add(model)


def _split_faults(fleet: Fleet) -> Iterator[Fault]:
    """A node that does not name its device has it detected, so that the name cannot be checked here."""
    devices = sorted({node.device for node in fleet.nodes if node.device})
    placed = {node.name for node in fleet.nodes if node.device}
    if any(instance.node not in placed for instance in fleet.instances):
        return
    for device in fleet.routing.split:
        if device not in devices:
            yield Fault(f"routing.split.{device}", f"no node has such cards{hint(device, devices)}")
