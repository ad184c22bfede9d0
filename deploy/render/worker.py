"""`Worker` resources (arcadia.kubeagi.k8s.com.cn) as a fleet. Pure.

A Worker names its model by reference; a `Model` resource in the same file says where the weights are. What the form
cannot say is told as a fault with a way out, or assumed and remarked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from deploy.fleet import Fault, Fleet, FleetError, parse_fleet

GROUP = "arcadia.kubeagi.k8s.com.cn"
ENGINES = {"fastchat": "openai-http", "fastchat-vllm": "vllm"}
KINDS = {"llm": "llm", "embedding": "embedding", "reranking": "rerank"}
DESCRIBED = ("creator", "displayName", "description")  # said of it, no part in how it runs
URL = "infermesh.dev/url"  # annotation: the running server of a `fastchat` Worker
GPU = "nvidia.com/gpu"
SUFFIXES = {
    "": 1,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "m": 1e-3,
}


@dataclass(slots=True)
class _Found:
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    instances: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def has_workers(text: str) -> bool:
    """Whether a file holds Worker resources, not a fleet."""
    try:
        return any(isinstance(item, dict) and item.get("kind") == "Worker" for item in yaml.safe_load_all(text))
    except yaml.YAMLError:
        return False


def fleet_of_workers(text: str, name: str = "workers") -> tuple[Fleet, tuple[str, ...]]:
    """The fleet, and what was assumed.

    Raises:
        FleetError: everything that has no counterpart here.
    """
    found = _Found()
    documents = [item for item in yaml.safe_load_all(text) if item is not None]
    models = {}
    for number, document in enumerate(documents):
        if not isinstance(document, dict) or document.get("kind") not in ("Worker", "Model"):
            found.faults.append(Fault(f"document[{number}].kind", "is neither Worker nor Model"))
        elif not str(document.get("apiVersion", "")).startswith(f"{GROUP}/"):
            found.faults.append(Fault(f"document[{number}].apiVersion", f"is not {GROUP}/…"))
        elif document["kind"] == "Model":
            models[str((document.get("metadata") or {}).get("name"))] = document.get("spec") or {}
    for number, document in enumerate(documents):
        if isinstance(document, dict) and document.get("kind") == "Worker":
            _worker(f"document[{number}]", document, models, found)
    if found.faults:
        raise FleetError(name, found.faults)
    raw = {"version": 1, "models": list(found.models.values()), "instances": found.instances}
    return parse_fleet(yaml.safe_dump(raw), name), tuple(found.remarks)


def _worker(at: str, document: dict[str, Any], models: dict[str, dict[str, Any]], found: _Found) -> None:
    meta, spec = document.get("metadata") or {}, document.get("spec") or {}
    allowed = ("type", "model", "resources", "storage", "additionalEnvs", *DESCRIBED)
    found.faults += [
        Fault(f"{at}.spec.{key}", f"has no counterpart (allowed: {', '.join(allowed)})")
        for key in spec
        if key not in allowed
    ]
    id, type = str(meta.get("name") or ""), spec.get("type") or "fastchat"
    if meta.get("namespace"):
        found.remarks.append(
            f"{id}: namespace {meta['namespace']} is not written; apply with kubectl -n {meta['namespace']}"
        )
    if not id:
        found.faults.append(Fault(f"{at}.metadata.name", "is needed"))
    if type not in ENGINES:
        found.faults.append(Fault(f"{at}.spec.type", f"{type!r} is not among {', '.join(ENGINES)}"))
        return
    reference = spec.get("model") or {}
    model = str(reference.get("name") or "") if isinstance(reference, dict) else ""
    if not model:
        found.faults.append(Fault(f"{at}.spec.model.name", "is needed: the Model that it serves"))
        return
    kind = _kind(at, model, models, found)
    engine = ENGINES[type] if kind == "llm" else "sentence-transformers"
    instance: dict[str, Any] = {"id": id, "model": model, "engine": engine, "labels": meta.get("labels") or {}}
    resources = dict(_resources(f"{at}.spec.resources", spec.get("resources") or {}, found))
    storage = _storage(f"{at}.spec.storage", spec["storage"], found) if spec.get("storage") else None
    told: dict[str, Any] = {"id": model, "kind": kind}
    if engine == "openai-http":
        instance["url"] = (meta.get("annotations") or {}).get(URL) or f"http://{id}:8000"
        if URL not in (meta.get("annotations") or {}):
            found.remarks.append(
                f"{id}: the FastChat server is taken to listen on {instance['url']}; annotation {URL} tells"
            )
        if resources or storage:
            found.remarks.append(
                f"{id}: resources and storage stay with that server; what is rendered stands before it"
            )
    else:
        told["source"] = _source(at, model, models, bool(storage), found)
        if resources:
            instance["resources"] = resources
        if storage:
            instance["storage"] = storage
    _environment(f"{at}.spec.additionalEnvs", spec.get("additionalEnvs") or [], instance, resources, found)
    found.models.setdefault(model, told)
    found.instances.append(instance)


def _kind(at: str, model: str, models: dict[str, dict[str, Any]], found: _Found) -> str:
    types = [word.strip() for word in str(models.get(model, {}).get("types") or "llm").split(",")]
    known = [KINDS[word] for word in types if word in KINDS]
    if not known:
        found.faults.append(Fault(f"{at}.spec.model", f"Model {model} has types {', '.join(types)}: not served here"))
    return known[0] if known else "llm"


def _source(at: str, model: str, models: dict[str, dict[str, Any]], stored: bool, found: _Found) -> str:
    """Where the weights are: the hub, if a Model says so, else a folder of the claimed storage."""
    hub = models.get(model, {}).get("huggingFaceRepo")
    if hub:
        return str(hub)
    if not stored:
        way = f"put its Model with huggingFaceRepo into the same file, or claim storage that has /models/{model}"
        found.faults.append(Fault(f"{at}.spec.model", f"nothing says where the weights of {model} are: {way}"))
    else:
        found.remarks.append(f"{model}: its weights are taken to be at /models/{model} on the claimed storage")
    return f"/models/{model}"


def _resources(at: str, raw: dict[str, Any], found: _Found) -> Iterator[tuple[str, Any]]:
    """Limits where they are given, else requests: what the process may use is what it is planned with."""
    together = {**(raw.get("requests") or {}), **(raw.get("limits") or {})}
    found.faults += [
        Fault(f"{at}.{key}", "is not limits or requests") for key in raw if key not in ("limits", "requests")
    ]
    names = {"cpu": "cpus", "memory": "memory_gib", GPU: "gpus"}
    for key, value in together.items():
        amount = quantity(str(value))
        if key not in names:
            found.faults.append(Fault(f"{at}.limits.{key}", f"has no counterpart (allowed: {', '.join(names)})"))
        elif amount is None:
            found.faults.append(Fault(f"{at}.limits.{key}", f"{value!r} is not a quantity, e.g. 4, 500m, 16Gi"))
        else:
            yield names[key], amount / 2**30 if key == "memory" else int(amount) if key == GPU else amount


def _storage(at: str, raw: dict[str, Any], found: _Found) -> dict[str, Any]:
    allowed = ("accessModes", "resources", "storageClassName", "volumeMode")
    found.faults += [
        Fault(f"{at}.{key}", f"has no counterpart (allowed: {', '.join(allowed)})") for key in raw if key not in allowed
    ]
    if raw.get("volumeMode", "Filesystem") != "Filesystem":
        found.faults.append(Fault(f"{at}.volumeMode", "model files need Filesystem"))
    size = quantity(str(((raw.get("resources") or {}).get("requests") or {}).get("storage", "")))
    if not size:
        found.faults.append(Fault(f"{at}.resources.requests.storage", "is needed, e.g. 50Gi"))
    modes = raw.get("accessModes") or ["ReadWriteOnce"]
    return {
        "size_gib": (size or 2**30) / 2**30,
        "storage_class": raw.get("storageClassName") or "",
        "access_mode": modes[0],
    }


def _environment(at: str, raw: list[Any], instance: dict[str, Any], resources: dict[str, Any], found: _Found) -> None:
    """NUMBER_GPUS is the tensor-parallel size, RAY_CLUSTER_INDEX the Ray cluster; the rest stays a variable."""
    others = {}
    for number, item in enumerate(raw):
        if not isinstance(item, dict) or "name" not in item or set(item) - {"name", "value"}:
            found.faults.append(
                Fault(f"{at}[{number}]", "must be {name, value}; values from elsewhere have no counterpart")
            )
            continue
        key, value = str(item["name"]), str(item.get("value", ""))
        if key not in ("NUMBER_GPUS", "RAY_CLUSTER_INDEX"):
            others[key] = value
        elif not value.isdigit() or (key == "NUMBER_GPUS" and not int(value)):
            found.faults.append(Fault(f"{at}[{number}].value", f"{value!r} is not a number that {key} can be"))
        elif key == "RAY_CLUSTER_INDEX":
            instance["ray_cluster"] = int(value)
        elif instance["engine"] != "vllm":
            found.faults.append(
                Fault(f"{at}[{number}]", f"NUMBER_GPUS splits a fastchat-vllm LLM, not {instance['engine']}")
            )
        else:
            instance["tp"] = int(value)
    if instance["engine"] == "vllm":
        gpus = resources.get("gpus")
        if gpus and instance.setdefault("tp", gpus) != gpus:
            found.faults.append(Fault(f"{at}", f"NUMBER_GPUS {instance['tp']} and {GPU} {gpus} contradict each other"))
        elif gpus is None and "tp" in instance:
            instance["resources"] = {**resources, "gpus": instance["tp"]}
    if others:
        instance["environment"] = others


def quantity(text: str) -> float | None:
    """A quantity of Kubernetes as a number; None where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]{0,2})", text)
    return float(match[1]) * SUFFIXES[match[2]] if match and match[2] in SUFFIXES else None
