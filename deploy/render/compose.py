"""A fleet as a Docker Compose project for one host. Pure.

Several hosts: one project a host (`node`), a Consul that all of them reach, instances on ports of the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from deploy.fleet import Fault, Fleet, FleetError, Instance, unserved
from deploy.launch.commands import of_this_host
from deploy.render import tls
from deploy.render.container import (
    GRPC,
    HTTP,
    LOADING,
    MODELS,
    SERVICE,
    START_S,
    STOP_MARGIN_S,
    UID,
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
from deploy.render.observability import observability

CONSUL = "${CONSUL_IMAGE:-hashicorp/consul:1.21}"  # a mirror's name may be put in when it is started
HOST_PORT = 50061  # of the first instance, where other hosts dial it
SHM_PER_GPU_GIB = 4  # NCCL and vLLM's workers talk through shared memory inside a host


def compose(fleet: Fleet, site: Site, shipped: Mapping[str, str], *, node: str = "", name: str = "fleet") -> Rendered:
    """`shipped`: the configuration files of deploy/otel, prometheus and grafana by their path there.

    Raises:
        FleetError: everything that keeps it from being rendered.
    """
    faults = [*unserved(fleet, "compose"), *container_faults(fleet, site, pvc=False), *_faults(fleet, node)]
    if faults:
        raise FleetError(name, faults)
    own_consul = not fleet.registry
    site = replace(site, registry=fleet.registry or "consul://consul:8500")
    instances = of_this_host(fleet, node)
    address = next((item.address for item in fleet.nodes if item.name == node or len(fleet.nodes) == 1), "")
    services: dict[str, Any] = {"consul": _consul()} if own_consul else {}
    gateway = gateway_container(fleet, site, advertise=f"{address}:{GRPC}" if address else "gateway:50050")
    services["gateway"] = _gateway(fleet, gateway, site, own_consul)
    files: dict[str, str] = {}
    for number, instance in enumerate(instances):
        port = HOST_PORT + number if address else 0
        told = f"{address}:{port}" if port else f"{slug(instance.id)}:{SERVICE}"
        made = instance_container(fleet, instance, site, advertise=told)
        services[made.name] = _instance(fleet, made, site, own_consul, port)
        files |= {f"files/{made.name}/{Path(path).name}": text for path, text in made.files.items()}
    watching, watching_files = observability(shipped, keys=not fleet.gateway.insecure, door=fleet.tls.gateway)
    services |= watching
    secrets = sorted({secret for one in services.values() for secret in one.get("secrets", ())})
    mounts = [mount for one in services.values() for mount in one.get("volumes", ())]
    volumes = sorted({mount.split(":")[0] for mount in mounts if isinstance(mount, str)})
    document = {
        "name": "infermesh",
        "services": services,
        "volumes": {volume: {} for volume in volumes if not volume.startswith((".", "/"))},
        **({"secrets": {secret: {"file": f"./secrets/{secret}"} for secret in secrets}} if secrets else {}),
    }
    files["compose.yaml"] = "# Made by `infermesh render compose`.\n" + yaml.safe_dump(
        document, sort_keys=False, width=120
    )
    remarks = [*container_remarks(fleet), *_remarks(fleet, secrets), *tls.compose_remarks(fleet, UID)]
    return Rendered({**files, **watching_files}, tuple(remarks))


def _faults(fleet: Fleet, node: str) -> Iterator[Fault]:
    names = [item.name for item in fleet.nodes]
    if len(names) > 1 and not node:
        yield Fault("nodes", f"a Compose project is for one host; say which: --node {' | '.join(names)}")
    if node and node not in names:
        yield Fault("nodes", f"--node {node!r} is not there; there are {', '.join(names) or 'none'}")
    if len(names) > 1 and not fleet.registry:
        yield Fault("registry", "several hosts need a Consul that all of them reach: consul://HOST:8500")
    if len(names) > 1 or fleet.registry:
        for index, item in enumerate(fleet.nodes):
            if not item.address:
                yield Fault(f"nodes[{index}].address", "is needed: others than this project's containers dial it there")
    if fleet.registry and not fleet.nodes:
        yield Fault("nodes", "the registry is outside, so this host needs a node with the address that others dial")
    for index, instance in enumerate(fleet.instances):
        if instance.storage and (instance.storage.storage_class or instance.storage.access_mode != "ReadWriteOnce"):
            yield Fault(
                f"instances[{index}].storage", "Compose has no storage classes and access modes; size_gib alone"
            )


def _remarks(fleet: Fleet, secrets: list[str]) -> Iterator[str]:
    if any(instance.storage for instance in fleet.instances):
        yield "storage: a named volume an instance; Docker does not enforce size_gib"
    if secrets:
        yield f"put these files, readable by uid {UID}, into secrets/ beside compose.yaml: {', '.join(secrets)}"


def _hardened(tmpfs: tuple[str, ...] = ("/tmp:mode=1777",)) -> dict[str, Any]:
    return {
        "read_only": True,
        "tmpfs": list(tmpfs),
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
    }


def _consul() -> dict[str, Any]:
    return {
        "image": CONSUL,
        "user": "100:1000",  # as which the image's own entry point would run it, after steps that need capabilities
        "command": ["agent", "-server", "-bootstrap-expect=1", "-ui", "-client=0.0.0.0", "-data-dir=/consul/data"],
        "healthcheck": {
            "test": ["CMD", "consul", "info"],
            "interval": "5s",
            "timeout": "5s",
            "retries": 12,
            "start_period": "10s",
        },
        # Nothing to keep: instances and gateways register again by themselves.
        **_hardened(("/tmp:mode=1777", "/consul/data:uid=100,gid=1000")),
    }


def _ours(made: Container, site: Site, health: list[str], start_s: float, own_consul: bool) -> dict[str, Any]:
    """What gateway and instances have in common."""
    found: dict[str, Any] = {
        "image": made.image,
        "user": f"{UID}:{UID}",
        "init": True,
        "command": [word.replace("$", "$$") for word in made.arguments],  # `$` starts a variable there
        "stop_grace_period": f"{site.grace_s + STOP_MARGIN_S:g}s",
        "healthcheck": {
            "test": ["CMD", *health],
            "interval": "15s",
            "timeout": "10s",
            "retries": 3,
            "start_period": f"{start_s:g}s",
            "start_interval": "5s",
        },
        **_hardened(),
    }
    if own_consul:
        found["depends_on"] = {"consul": {"condition": "service_healthy"}}
    return found


# Only where a collector runs: INFERMESH_OTLP=http://otel-collector:4317 docker compose --profile obs up
SPANS = {"INFERMESH_OTLP": "${INFERMESH_OTLP:-}"}


def _gateway(fleet: Fleet, made: Container, site: Site, own_consul: bool) -> dict[str, Any]:
    found = _ours(made, site, tls.health(GRPC, tls.door(fleet)), 60, own_consul)
    found["environment"] = dict(SPANS)
    doors = ((fleet.gateway.grpc, GRPC), (fleet.gateway.http, HTTP))
    found["ports"] = [_published(address, inside) for address, inside in doors if address]
    found["volumes"] = ["gateway-state:/state", *tls.host_mounts(fleet, gateway=True)]
    if secrets := secrets_of(fleet):
        found["secrets"] = secrets
    return found


def _published(address: str, inside: int) -> str:
    return f"{address}:{inside}" if not address.startswith(":") else f"{address[1:]}:{inside}"


def _instance(fleet: Fleet, made: Container, site: Site, own_consul: bool, port: int) -> dict[str, Any]:
    instance = made.instance
    assert instance is not None
    found = _ours(made, site, tls.health(SERVICE, tls.inside(fleet)), START_S, own_consul)
    found["environment"] = SPANS | {key: value.replace("$", "$$") for key, value in made.environment.items()}
    if instance.labels:
        found["labels"] = {key: value.replace("$", "$$") for key, value in instance.labels.items()}
    store = f"models-{made.name}" if instance.storage else "models"
    found["volumes"] = [f"{store}:{MODELS}", "cache:/cache", *_weights(fleet, instance)]
    found["volumes"] += [f"./files/{made.name}/{Path(path).name}:{path}:ro" for path in made.files]
    found["volumes"] += tls.host_mounts(fleet, gateway=False)
    if port:
        found["ports"] = [f"{port}:{SERVICE}"]
    if secrets := secrets_of(fleet, instance):
        found["secrets"] = secrets
    if resources := _resources(made, instance):
        found["deploy"] = {"resources": resources}
    if made.gpus:
        found["shm_size"] = f"{SHM_PER_GPU_GIB * made.gpus}gb"
    return found


def _weights(fleet: Fleet, instance: Instance) -> Iterator[str]:
    """Local files of the model, where the host has them and the engine reads them."""
    model = fleet.model(instance.model)
    if fleet.engine_of(instance) not in LOADING:
        return
    for path in (model.source, model.chat_template):
        if path.startswith("/"):
            yield f"{path}:{path}:ro"


def _resources(made: Container, instance: Instance) -> dict[str, Any]:
    found: dict[str, Any] = {}
    told = instance.resources
    limits = {}
    if told and told.cpus:
        limits["cpus"] = f"{told.cpus:g}"
    if told and told.memory_gib:
        limits["memory"] = f"{round(told.memory_gib * 1024)}m"
    if limits:
        found["limits"] = limits
    if made.gpus:
        # `count` and `device_ids` exclude each other.
        which = {"device_ids": [str(card) for card in made.cards]} if made.cards else {"count": made.gpus}
        found["reservations"] = {"devices": [{"driver": "nvidia", **which, "capabilities": ["gpu"]}]}
    return found
