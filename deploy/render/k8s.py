"""A fleet as Kubernetes objects: a workload a class of like instances. Pure.

Instances that differ in nothing but id, cards and host are one class. A class whose storage is ReadWriteOnce is a
StatefulSet with a volume a replica; any other is a Deployment, with one volume for all or an emptyDir.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from deploy.fleet import Fault, Fleet, FleetError, Instance, unserved
from deploy.launch.cards import gpus_of
from deploy.render import k8s_objects as k8s
from deploy.render import tls
from deploy.render.compose import CONSUL, SHM_PER_GPU_GIB
from deploy.render.container import (
    GRPC,
    HTTP,
    MODELS,
    SERVICE,
    Container,
    Rendered,
    Site,
    container_faults,
    container_remarks,
    gateway_container,
    instance_container,
    secrets_of,
    slug,
)

METRIC = "infermesh_gateway_desired_replicas"  # of the group that a class is
PROMETHEUS = "http://prometheus:9090"
DEVICE_LABEL = "infermesh.dev/device"
RAY_LABEL = "infermesh.dev/ray-cluster"
OF_ONE = ("id", "node", "cards", "listen", "advertise", "python", "min", "max")  # in which instances of a class differ
GATEWAYS = 2


@dataclass(frozen=True, slots=True)
class Class:
    """Like instances. `least` and `most`: replicas; equal = not scaled."""

    name: str
    instances: tuple[Instance, ...]
    selector: tuple[tuple[str, str], ...]
    least: int
    most: int

    @property
    def scaled(self) -> bool:
        return self.most > self.least


def render_k8s(fleet: Fleet, site: Site, *, autoscaler: str = "hpa", name: str = "fleet") -> Rendered:
    """A file a component, and a kustomization over them.

    Raises:
        FleetError: everything that keeps it from being rendered.
    """
    faults = [*unserved(fleet, "k8s"), *container_faults(fleet, site, pvc=True), *_faults(fleet)]
    if faults:
        raise FleetError(name, faults)
    files = {} if fleet.registry else {"consul.yaml": k8s.consul(CONSUL)}
    site = replace(site, registry=fleet.registry or f"consul://{k8s.CONSUL}:8500")
    classes = classes_of(fleet, site)
    files["gateway.yaml"] = _gateway(fleet, site, classes)
    for one in classes:
        files[f"{one.name}.yaml"] = _class(fleet, one, site, autoscaler)
    files["kustomization.yaml"] = [
        {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": sorted(files)}
    ]
    texts = {path: _text(objects) for path, objects in files.items()}
    return Rendered(texts, tuple([*container_remarks(fleet), *_remarks(fleet, classes, autoscaler, site)]))


def classes_of(fleet: Fleet, site: Site) -> list[Class]:
    """The classes, in the order of the file."""
    alike: dict[str, list[Instance]] = {}
    for instance in fleet.instances:
        told = instance.model_dump(mode="json", exclude=set(OF_ONE))
        key = repr((told, _selector(fleet, instance), gpus_of(fleet, instance, site.catalogue)))
        alike.setdefault(key, []).append(instance)
    found: list[Class] = []
    for group in alike.values():
        first = group[0]
        lead = slug(first.id) if len(group) == 1 else _common(fleet, first)
        taken = {one.name for one in found} | {"gateway", "consul", "kustomization"}
        name = next(name for name in (lead, *(f"{lead}-{n}" for n in range(2, 4097))) if name not in taken)
        least = sum(item.min or 1 for item in group)
        most = max(least, sum(item.max or item.min or 1 for item in group))
        found.append(Class(name, tuple(group), _selector(fleet, first), least, most))
    return found


def _common(fleet: Fleet, instance: Instance) -> str:
    device = next((node.device for node in fleet.nodes if node.name == instance.node), "")
    tier = "" if instance.tier == "primary" else instance.tier
    return slug("-".join(filter(None, (instance.model.rpartition("/")[2], tier, device))))


def _selector(fleet: Fleet, instance: Instance) -> tuple[tuple[str, str], ...]:
    """Who adopts a server needs none of its cards, and that may be no node of the cluster."""
    node = next((node for node in fleet.nodes if node.name == instance.node), None)
    if node is None or fleet.engine_of(instance) == "openai-http":
        return ()
    told = {DEVICE_LABEL: label_value(node.device), "topology.kubernetes.io/zone": label_value(node.zone)}
    return tuple((key, value) for key, value in told.items() if value)


def label_value(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63].strip("-._")


def _gateway(fleet: Fleet, site: Site, classes: list[Class]) -> list[k8s.Object]:
    name = "infermesh-gateway"
    made = gateway_container(fleet, site, advertise=f"$(POD_IP):{GRPC}")
    scale = [word for one in classes if one.scaled for word in ("--scale", f"{one.name}={one.least}:{one.most}")]
    made = replace(made, arguments=(*made.arguments, "--id", "$(POD_NAME)", *scale))
    ports = {"grpc": GRPC, "http": HTTP}
    certificates = list(tls.secret_mounts(fleet, gateway=True))
    template = k8s.pod(
        name,
        made,
        grace_s=site.grace_s,
        probes=k8s.http_probes(over_tls=fleet.tls.gateway is not None),
        ports=ports,
        volumes=[{"name": "state", "emptyDir": {}}, *(volume for volume, _ in certificates)],
        mounts=[{"name": "state", "mountPath": "/state"}, *(mount for _, mount in certificates)],
        secrets=secrets_of(fleet),
        resources={"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
        selector={},
        more_labels={},
        drain=True,
    )
    spec = {"replicas": GATEWAYS, "selector": {"matchLabels": k8s.labels(name)}, "template": template}
    workload = k8s.named("Deployment", "apps/v1", name, spec)
    return [k8s.service(name, ports), workload, k8s.disruption_budget(name)]


def _class(fleet: Fleet, one: Class, site: Site, autoscaler: str) -> list[k8s.Object]:
    instance = one.instances[0]
    made = instance_container(fleet, instance, site, id="$(POD_NAME)", advertise=f"$(POD_IP):{SERVICE}")
    if one.scaled:
        made = replace(made, arguments=(*made.arguments, "--group", one.name))
    storage = instance.storage
    kind = "StatefulSet" if storage and storage.access_mode == "ReadWriteOnce" else "Deployment"
    objects = [k8s.service(one.name, {"grpc": SERVICE}, headless=True)]
    volumes: list[k8s.Object] = [{"name": "cache", "emptyDir": {}}]
    mounts = [{"name": "models", "mountPath": MODELS}, {"name": "cache", "mountPath": "/cache"}]
    claim = k8s.claim(storage.size_gib, storage.storage_class, storage.access_mode) if storage else {}
    if not storage:
        volumes.append({"name": "models", "emptyDir": {}})
    elif kind == "Deployment":
        volume = f"{one.name}-models"
        objects.append(k8s.named("PersistentVolumeClaim", "v1", volume, claim))
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": volume}})
    if made.gpus > 1:
        size = f"{SHM_PER_GPU_GIB * made.gpus}Gi"
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if made.files:
        names = {path: path.rpartition("/")[2] for path in made.files}
        texts = {names[path]: text for path, text in made.files.items()}
        meta = {"name": f"{one.name}-files", "labels": k8s.labels(one.name)}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": texts})
        volumes.append({"name": "files", "configMap": {"name": f"{one.name}-files"}})
        mounts.append({"name": "files", "mountPath": next(iter(made.files)).rpartition("/")[0]})
    for certificates, at in tls.secret_mounts(fleet, gateway=False):
        volumes.append(certificates)
        mounts.append(at)
    certificate = tls.inside(fleet)
    more = {key: value for key, value in instance.labels.items() if key not in k8s.labels(one.name)}
    if instance.ray_cluster is not None:
        more[RAY_LABEL] = label_value(str(instance.ray_cluster))
    template = k8s.pod(
        one.name,
        made,
        grace_s=site.grace_s,
        probes=k8s.grpc_probes(tls.health(SERVICE, certificate) if certificate else ()),
        ports={"grpc": SERVICE},
        volumes=volumes,
        mounts=mounts,
        secrets=secrets_of(fleet, instance),
        resources=_resources(made, instance),
        selector=dict(one.selector),
        more_labels=more,
    )
    scaled = one.scaled and autoscaler != "none"
    spec: dict[str, Any] = {} if scaled else {"replicas": one.least}  # else the autoscaler's own
    spec |= {"selector": {"matchLabels": k8s.labels(one.name)}, "template": template}
    if kind == "StatefulSet":
        spec |= {"serviceName": one.name, "podManagementPolicy": "Parallel"}
        spec["volumeClaimTemplates"] = [{"metadata": {"name": "models"}, "spec": claim}]
    objects += [k8s.named(kind, "apps/v1", one.name, spec), k8s.disruption_budget(one.name)]
    if scaled and autoscaler == "hpa":
        objects.append(k8s.horizontal(kind, one.name, one.least, one.most, METRIC))
    elif scaled:
        objects.append(k8s.scaled_object(kind, one.name, one.least, one.most, METRIC, PROMETHEUS))
    return objects


def _resources(made: Container, instance: Instance) -> k8s.Object:
    """Memory is limited at what is asked for; the CPU is asked for and not throttled, which would stall an engine."""
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}
    if told := instance.resources:
        if told.cpus:
            requests["cpu"] = f"{round(told.cpus * 1000)}m"
        if told.memory_gib:
            requests["memory"] = limits["memory"] = f"{round(told.memory_gib * 1024)}Mi"
    if made.gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(made.gpus)
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _faults(fleet: Fleet) -> Iterator[Fault]:
    for index, instance in enumerate(fleet.instances):
        if instance.telemetry:
            why = "is for one instance by its id; pods register under their own names"
            yield Fault(f"instances[{index}].telemetry", why)
        for key, value in instance.labels.items():
            if key in k8s.labels(""):
                yield Fault(
                    f"instances[{index}].labels.{key}", "is set by render, to find the pods by; choose another key"
                )
            elif not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                yield Fault(f"instances[{index}].labels.{key}", f"{value!r}: not a label of Kubernetes")
    if fleet.registry.startswith("mesh://127.") or "://localhost" in fleet.registry:
        yield Fault("registry", f"{fleet.registry} would be the pod itself; leave it out for a Consul of its own")


_LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")


def _remarks(fleet: Fleet, classes: list[Class], autoscaler: str, site: Site) -> Iterator[str]:
    for node in fleet.nodes:
        asked = sum(gpus_of(fleet, item, site.catalogue) for item in fleet.instances if item.node == node.name)
        if node.count and asked > node.count:
            yield (
                f"{node.name}: has {node.count} cards and its instances ask for {asked}: Kubernetes gives whole GPUs, "
                "so instances that share a card need time slicing or MIG of the device plugin, or more cards"
            )
    if not fleet.gateway.insecure:
        names = sorted({secret for one in classes for secret in secrets_of(fleet, one.instances[0])})
        given = " ".join(f"--from-file={name}" for name in names)
        yield f"the pods want a Secret: kubectl create secret generic {k8s.SECRET} {given}"
    yield from tls.k8s_remarks(fleet)
    devices = sorted({value for one in classes for key, value in one.selector if key == DEVICE_LABEL})
    if devices:
        yield f"label the nodes: kubectl label node NODE {DEVICE_LABEL}={' | '.join(devices)}"
    if any(one.scaled for one in classes):
        yield {
            "hpa": f"the HPA asks for the external metric {METRIC}; docs/deploy.md has the rule for prometheus-adapter",
            "keda": f"KEDA asks Prometheus at {PROMETHEUS} for {METRIC}",
            "none": f"nothing scales by min and max: --autoscaler none; the gateway still says {METRIC}",
        }[autoscaler]
    if any(instance.ray_cluster is not None for instance in fleet.instances):
        yield f"ray_cluster: kept as the label {RAY_LABEL}; a pod stands alone and joins no Ray cluster"
    for key in ("grpc", "http"):
        if getattr(fleet.gateway, key) != type(fleet.gateway).model_fields[key].get_default():
            yield f"gateway.{key}: is for `up` and compose; here the Service infermesh-gateway listens"


def _text(objects: list[k8s.Object]) -> str:
    dumped = yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=120)
    return f"# Made by `infermesh render k8s`.\n{dumped}"


class _Plain(yaml.SafeDumper):
    """Writes equal parts out, instead of an anchor and references to it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
