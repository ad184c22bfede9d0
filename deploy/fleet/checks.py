"""Reading a fleet file: every fault at once, each with its key's path and what is allowed there. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from deploy.fleet.faults import Fault, causes, hint, known
from deploy.fleet.routing import routing_faults
from deploy.fleet.values import ENGINES_OF, Fleet, Instance, Later, Node, Speed


class FleetError(ValueError):
    """Every fault of a fleet file, a line each."""

    def __init__(self, name: str, faults: list[Fault]) -> None:
        self.faults = tuple(faults)
        many = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        super().__init__(f"{name}: {many}\n" + "\n".join(f"  {fault}" for fault in faults))


def parse_fleet(text: str, name: str = "fleet") -> Fleet:
    """Reads a fleet file.

    Raises:
        FleetError: everything that is wrong with it.
    """
    try:
        raw = yaml.load(text, Loader=_OneOfEach)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
        raise FleetError(name, [Fault(where, f"not YAML: {getattr(error, 'problem', None) or error}")]) from None
    if not isinstance(raw, dict):
        raise FleetError(name, [Fault("file", f"must be a mapping with {', '.join(Fleet.model_fields)}")])
    try:
        fleet = Fleet.model_validate(raw)
    except ValidationError as error:
        raise FleetError(name, [_fault(item) for item in causes(error.errors())]) from None
    if faults := list(_contradictions(fleet)):
        raise FleetError(name, faults)
    return fleet


def unserved(fleet: Fleet, by: str = "up") -> list[Fault]:
    """The keys in use that `up`, `ray` (`up` on Ray), `compose` or `k8s` does not serve yet."""
    return list(_later(fleet, "", by))


def _later(part: BaseModel, path: str, by: str) -> Iterator[Fault]:
    for key, field in type(part).model_fields.items():
        value, at = getattr(part, key), f"{path}.{key}".lstrip(".")
        if value == field.get_default(call_default_factory=True):
            continue
        mark = next((item for item in field.metadata if isinstance(item, Later)), None)
        if mark:
            if by in mark.but:
                continue
            yield Fault(at, f"not served yet: {mark.what}")
        elif isinstance(value, BaseModel):
            yield from _later(value, at, by)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _later(item, f"{at}[{index}]", by)


def _contradictions(fleet: Fleet) -> Iterator[Fault]:
    """What no single value shows."""
    yield from _twice("models", "id", [model.id for model in fleet.models])
    yield from _twice("nodes", "name", [node.name for node in fleet.nodes])
    yield from _twice("instances", "id", [instance.id for instance in fleet.instances])
    clusters = [cluster.name for cluster in fleet.rayClusters]
    yield from _twice("rayClusters", "name", clusters)
    models = {model.id: model for model in fleet.models}
    for index, model in enumerate(fleet.models):
        at = f"models[{index}]"
        for number, alias in enumerate(model.aliases):
            if alias in models:
                yield Fault(f"{at}.aliases[{number}]", f"{alias!r} is a model's id")
        if model.chat_template and model.prompt_template:
            yield Fault(f"{at}.chat_template", "excludes prompt_template")
        if model.kind != "llm":
            for key in ("chat_template", "prompt_template", "tool_parser", "reasoning_parser"):
                if getattr(model, key):
                    yield Fault(f"{at}.{key}", f"is for kind llm, this model is {model.kind}")
        if model.kind != "rerank" and model.scorer != "auto":
            yield Fault(f"{at}.scorer", f"is for kind rerank, this model is {model.kind}")
    yield from routing_faults(fleet)
    nodes = {node.name: node for node in fleet.nodes}
    for index, instance in enumerate(fleet.instances):
        at = f"instances[{index}]"
        cluster = instance.ray_cluster
        if clusters and cluster is not None and cluster not in (*clusters, *range(len(clusters))):
            there = ", ".join(f"{number} {name}" for number, name in enumerate(clusters))
            yield Fault(f"{at}.ray_cluster", f"{cluster!r} is not there; rayClusters has {there}")
        if instance.node:
            yield from known(f"{at}.node", instance.node, list(nodes))
        if instance.model not in models:
            yield from known(f"{at}.model", instance.model, list(models))
        else:
            yield from _instance_faults(at, fleet, instance, nodes.get(instance.node))


def _instance_faults(at: str, fleet: Fleet, instance: Instance, node: Node | None) -> Iterator[Fault]:
    model, engine = fleet.model(instance.model), fleet.engine_of(instance)
    if engine not in ENGINES_OF[model.kind]:
        yield Fault(
            f"{at}.engine", f"{engine} does not serve kind {model.kind}; allowed: {', '.join(ENGINES_OF[model.kind])}"
        )
        return
    own = {key for key, engines in _OF_ENGINE.items() if engine in engines}
    for key in _OF_ENGINE:
        if key not in own and getattr(instance, key) != Instance.model_fields[key].get_default():
            yield Fault(f"{at}.{key}", f"engine {engine} does not take it; it is for {', '.join(_OF_ENGINE[key])}")
    other = _SPEED_OF_LLM if model.kind != "llm" else _SPEED_OF_ENCODER
    for key in sorted(other):
        if instance.speed and getattr(instance.speed, key) is not None:
            yield Fault(f"{at}.speed.{key}", f"is not a number of kind {model.kind}; it takes {_takes(other)}")
    if engine == "openai-http" and not (instance.url or model.source):
        yield Fault(f"{at}.url", "engine openai-http needs the server's URL, e.g. http://127.0.0.1:8001/v1")
    if engine in ("vllm", "sentence-transformers") and not (model.source or model.architecture):
        where = next(i for i, m in enumerate(fleet.models) if m.id == model.id)
        yield Fault(f"models[{where}].source", f"engine {engine} needs a hub name or a local folder")
    if instance.context and not 0 <= instance.context[0] < instance.context[1]:
        yield Fault(f"{at}.context", f"[min, max] with 0 <= min < max, not {list(instance.context)}")
    if instance.min and instance.max and instance.min > instance.max:
        yield Fault(f"{at}.min", f"{instance.min} is above max {instance.max}")
    if len(set(instance.cards)) != len(instance.cards):
        yield Fault(f"{at}.cards", "names a card twice")
    if node and node.count and any(card >= node.count for card in instance.cards):
        yield Fault(f"{at}.cards", f"node {node.name} has cards 0 .. {node.count - 1}")
    if node and node.count and (instance.tp or 0) > node.count:
        why = "TP stays inside a host; across hosts use pp"
        yield Fault(f"{at}.tp", f"{instance.tp} cards, node {node.name} has {node.count}: {why}")
    if (
        engine == "vllm"
        and instance.cards
        and len(instance.cards) != (instance.tp or len(instance.cards)) * instance.pp
    ):
        yield Fault(f"{at}.cards", f"{len(instance.cards)} cards for tp {instance.tp} × pp {instance.pp}")


_SPEED_OF_ENCODER = frozenset({"fixed_ms", "tokens_per_s"})
_SPEED_OF_LLM = frozenset(Speed.model_fields) - _SPEED_OF_ENCODER


def _takes(other: frozenset[str]) -> str:
    return ", ".join(key for key in Speed.model_fields if key not in other)


_OF_ENGINE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("tp", "pp", "vram_ratio", "kv_cache_dtype", "quantization", "engine_args"), ("vllm",)),
    **dict.fromkeys(("url", "upstream_model", "api_key_file"), ("openai-http",)),
    **dict.fromkeys(("replicas", "backend"), ("sentence-transformers",)),
    "cards": ("vllm", "openai-http", "sentence-transformers"),
}


def _twice(part: str, key: str, names: list[str]) -> Iterator[Fault]:
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Fault(f"{part}[{index}].{key}", f"{name!r} is there already, at {part}[{names.index(name)}]")


def _fault(item: Any) -> Fault:
    """A pydantic error in our words."""
    path = ""
    for step in item["loc"]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    path = path.lstrip(".")
    if item["type"] == "extra_forbidden":
        return Fault(path, f"unknown key{hint(str(item['loc'][-1]), _keys_at(item['loc'][:-1]))}")
    if item["type"] == "missing":
        return Fault(path, "is needed")
    given = repr(item["input"])
    return Fault(path, f"{item['msg'][0].lower()}{item['msg'][1:]}" + (f", not {given}" if len(given) < 60 else ""))


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed where `loc` leads."""
    here: type[BaseModel] | None = Fleet
    for step in loc:
        if isinstance(step, str) and here is not None and step in here.model_fields:
            here = _part_of(here.model_fields[step].annotation)
    return list(here.model_fields) if here is not None else []


def _part_of(annotation: Any) -> type[BaseModel] | None:
    """The model class inside `tuple[X, ...]`, `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((part for part in map(_part_of, get_args(annotation)) if part is not None), None)


class _OneOfEach(yaml.SafeLoader):
    """YAML that refuses a key given twice, instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", key.start_mark)
            seen.add(name if isinstance(name, str) else None)
        return super().construct_mapping(node, deep)
