"""`configs/common.json` of the model server whose README shows that form, as a fleet file's document. Pure.

The form: `language_model`, `embedding_model`, `rerank_model`, each {name: {model_path, device, replica, …}}, and
`telemetry`. What has no counterpart is told key by key, and nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deploy.fleet import Fault

KINDS = {"language_model": "llm", "embedding_model": "embedding", "rerank_model": "rerank"}
NODE = "this-host"
DEVICE = re.compile(r"cuda:(\d+)")
TEMPLATE = ("sys", "user", "ai", "sep")
OF_ALL = ("model_path", "device", "replica")
OF_LLM = ("vram_ratio", "tensor_parallel_size", "max_tokens", "kv_cache_dtype", "quantization", "template")


@dataclass(slots=True)
class Imported:
    """A fleet's document and, by the key's path, what could not be taken over (`faults`) or was decided (`remarks`)."""

    document: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def import_common(raw: Any) -> Imported:
    """`raw`: the file's JSON."""
    found = Imported()
    if not isinstance(raw, dict):
        found.faults.append(Fault("file", "must be an object with language_model, embedding_model, rerank_model"))
        return found
    models: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for part, value in raw.items():
        if part in KINDS:
            if not isinstance(value, dict):
                found.faults.append(Fault(part, "must be an object: a model's name and what it is"))
                continue
            for name, told in value.items():
                _model(f"{part}.{name}", KINDS[part], name, told, models, instances, found)
        elif part == "telemetry":
            continue  # below: it is about the instances
        elif part == "port":
            found.document["gateway"] = {"http": f"127.0.0.1:{value}"}
        else:
            told_kinds = ", ".join((*KINDS, "telemetry", "port"))
            found.faults.append(Fault(part, f"has no counterpart in a fleet file (known: {told_kinds})"))
    if "telemetry" in raw:
        _telemetry(raw["telemetry"], models, instances, found)
    if not models and not found.faults:
        found.faults.append(Fault("file", f"names no model; one of {', '.join(KINDS)} is needed"))
    cards = [card for instance in instances for card in instance.get("cards", ())]
    busy = {card for instance in instances if instance.get("engine") == "vllm" for card in instance.get("cards", ())}
    for instance in instances:
        if shared := sorted(busy & set(instance.get("cards", ()))) if "engine" not in instance else []:
            which = ", ".join(map(str, shared))
            found.remarks.append(
                f"{instance['id']}: shares card {which} with an LLM, whose vram_ratio must leave it room"
            )
    nodes = [{"name": NODE, "count": max(cards) + 1}] if cards else []
    for instance in instances:
        if nodes:
            instance["node"] = NODE
    found.document = {"version": 1, "models": models, "nodes": nodes, "instances": instances, **found.document}
    return found


def _model(
    at: str,
    kind: str,
    name: str,
    told: Any,
    models: list[dict[str, Any]],
    instances: list[dict[str, Any]],
    found: Imported,
) -> None:
    if not isinstance(told, dict):
        found.faults.append(Fault(at, "must be an object with model_path"))
        return
    allowed = (*OF_ALL, *(OF_LLM if kind == "llm" else ()))
    found.faults += [
        Fault(f"{at}.{key}", f"has no counterpart for kind {kind} (known: {', '.join(allowed)})")
        for key in told
        if key not in allowed
    ]
    if not told.get("model_path"):
        found.faults.append(Fault(f"{at}.model_path", "is needed: a folder or a hub name"))
    model: dict[str, Any] = {"id": name, "kind": kind, "source": str(told.get("model_path", ""))}
    cards = list(_cards(f"{at}.device", told.get("device", []), found))
    replicas = told.get("replica", 1)
    if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 1:
        found.faults.append(Fault(f"{at}.replica", f"{replicas!r} is not a number from 1 up"))
        replicas = 1
    if kind == "llm":
        common = dict(_of_llm(at, told, model, found))
        instances += _llms(at, name, common, cards, replicas, found)
    else:
        one: dict[str, Any] = {"id": name, "model": name, "replicas": replicas}
        instances.append({**one, "cards": cards} if cards else one)
    models.append(model)


def _of_llm(at: str, told: dict[str, Any], model: dict[str, Any], found: Imported) -> Iterator[tuple[str, Any]]:
    """The instance's keys; the model's own go into `model`."""
    for key in ("vram_ratio", "kv_cache_dtype", "quantization"):
        if key in told:
            yield key, told[key]
    if "tensor_parallel_size" in told:
        yield "tp", told["tensor_parallel_size"]
    if "max_tokens" in told:
        model["max_context"] = told["max_tokens"]
        found.remarks.append(f"{at}.max_tokens: taken as the longest prompt and answer together (max_context)")
    template = told.get("template")
    if template is None:
        return
    if isinstance(template, dict) and not set(template) - set(TEMPLATE) and {"user", "ai"} <= set(template):
        model["prompt_template"] = template
    else:
        found.faults.append(
            Fault(f"{at}.template", f"must be an object of {', '.join(TEMPLATE)}, user and ai at least")
        )


def _llms(
    at: str, name: str, common: dict[str, Any], cards: list[int], replicas: int, found: Imported
) -> Iterator[dict[str, Any]]:
    """An instance is one engine: `tp` cards each, as many of them as `cards` fill."""
    tp = common.get("tp", 1 if replicas > 1 else len(cards) or 1)
    if not isinstance(tp, int) or tp < 1:
        found.faults.append(Fault(f"{at}.tensor_parallel_size", f"{tp!r} is not a number from 1 up"))
        return
    if cards and len(cards) != tp * replicas:
        way = f"tensor_parallel_size {tp} × replica {replicas} needs {tp * replicas}"
        found.faults.append(Fault(f"{at}.device", f"names {len(cards)} cards, {way}"))
        return
    for number in range(replicas):
        id = name if replicas == 1 else f"{name}-{number}"
        own = {"cards": cards[number * tp : (number + 1) * tp]} if cards else {}
        yield {"id": id, "model": name, "engine": "vllm", **common, "tp": tp, **own}


def _cards(at: str, device: Any, found: Imported) -> Iterator[int]:
    for word in [device] if isinstance(device, str) else device if isinstance(device, list) else [device]:
        match = DEVICE.fullmatch(str(word))
        if match:
            yield int(match[1])
        elif word != "cpu":
            found.faults.append(Fault(at, f"{word!r} is neither cuda:N nor cpu"))


def _telemetry(value: Any, models: list[dict[str, Any]], instances: list[dict[str, Any]], found: Imported) -> None:
    """The ids that callers are told: the server's one pair is that of its LLM, where it has a single instance."""
    if not isinstance(value, dict) or set(value) - {"enable", "instance_id", "model_id"}:
        found.faults.append(Fault("telemetry", "must be an object of enable, instance_id, model_id"))
        return
    if not value.get("enable"):
        for instance in instances:
            instance["telemetry"] = {"enable": False}
        return
    llms = {model["id"] for model in models if model["kind"] == "llm"}
    told = [instance for instance in instances if instance["model"] in llms]
    ids = {key: value[key] for key in ("instance_id", "model_id") if value.get(key)}
    if len(told) == 1 and ids:
        told[0]["telemetry"] = ids
    elif ids:
        found.remarks.append(
            f"telemetry: {', '.join(ids)} not taken over: one name, and {len(told)} LLM instances here"
        )
