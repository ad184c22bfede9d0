"""A fleet as what a Ray cluster is made of: the `ray start` line of every host, and what will be placed on them. Pure.

The instances themselves need no files: `infermesh up --fleet fleet.yaml` places them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from deploy.fleet import Fleet, FleetError, Instance, Node, unserved
from deploy.fleet.values import RayCluster
from deploy.launch.commands import Shared, start_faults, tls_files
from deploy.launch.on_ray.command import node_command
from deploy.launch.on_ray.need import clusters, ray_faults, ray_remarks
from deploy.launch.programs import place_of
from deploy.launch.replicas import group_of, least, most, replica_faults
from deploy.planner.catalogue import Catalogue
from deploy.render.container import Rendered, Site

HEAD_PORT = 6379
ASSUMED = "HEAD"  # the head's host, where the file names no cluster


def render_ray(fleet: Fleet, site: Site, *, name: str = "fleet") -> Rendered:
    """`start.sh`, `placements.yaml` and the completed `fleet.yaml`.

    Raises:
        FleetError: everything that keeps it from being placed.
    """
    found = clusters(fleet, "" if fleet.rayClusters else f"{ASSUMED}:{HEAD_PORT}")
    faults = [*unserved(fleet, "ray"), *start_faults(fleet, ray=True), *ray_faults(fleet, found)]
    faults += replica_faults(fleet)
    if faults:
        raise FleetError(name, faults)
    placements = [_placement(fleet, instance, found, site) for instance in fleet.instances]
    told = yaml.safe_dump(fleet.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=120)
    files = {
        "start.sh": "".join(_start(fleet, found[0].headAddress, site.catalogue)),
        "placements.yaml": "# Made by `infermesh render ray`: a placement group each.\n"
        + yaml.safe_dump(placements, sort_keys=False, width=120, default_flow_style=None),
        "fleet.yaml": f"# Made by `infermesh render ray`.\n{told}",
    }
    ray = "" if fleet.rayClusters else f" --ray {ASSUMED}:{HEAD_PORT}"
    return Rendered(files, (*ray_remarks(fleet), f"then, on the head: infermesh up --fleet fleet.yaml{ray}"))


def _placement(fleet: Fleet, instance: Instance, found: tuple[RayCluster, ...], site: Site) -> dict[str, Any]:
    cluster, need = place_of(fleet, instance, found, site.catalogue)
    gateway = fleet.gateway
    shared = Shared(
        fleet.registry or "mesh://HEAD:50049",
        gateway.keys,
        gateway.operator_key_file,
        gateway.insecure,
        site.grace_s,
        otlp=gateway.otlp,
        otlp_ratio=gateway.otlp_ratio,
        instances_tls=tls_files(fleet.tls.instances) if fleet.tls.instances else None,
    )
    made = node_command(fleet, instance, need, shared, str, site.reckoned.get(instance.id, {}), group_of(instance))
    return {
        "instance": instance.id,
        "cluster": cluster.name,
        "strategy": "PACK" if need.spans else "STRICT_PACK",
        "replicas": [least(instance), most(instance)],
        "hosts": need.hosts,
        "bundles": [{"host": host, **resources} for host, resources in need.bundles()],
        "command": list(made.argv),
    }


def _start(fleet: Fleet, address: str, catalogue: Catalogue) -> Iterator[str]:
    """A shell script: a kind of host a case."""
    port = address.rpartition(":")[2]
    yield "#!/bin/sh\n# Made by `infermesh render ray`: sh start.sh head, then on each host: sh start.sh ITS_KIND\n"
    yield 'set -eu\ncase "${1:-}" in\n'
    head = ["ray", "start", "--head", f"--port={port}", "--num-cpus=0", "--num-gpus=0", "--disable-usage-stats"]
    yield f"head) {shlex.join(head)} ;;\n"
    for node in fleet.nodes:
        yield f"{node.name}) {shlex.join(start_words(node, address, catalogue))} ;;\n"
    kinds = " | ".join(["head", *(node.name for node in fleet.nodes)])
    yield f'*) echo "usage: sh start.sh {kinds}" >&2; exit 2 ;;\nesac\n'


def start_words(node: Node, address: str, catalogue: Catalogue) -> list[str]:
    """How a host of this kind joins."""
    card = catalogue.cards.get(node.device)
    cpu = card is not None and card.cpu
    words = ["ray", "start", f"--address={address}", "--disable-usage-stats"]
    if node.count or cpu:
        words.append(f"--num-gpus={0 if cpu else node.count}")
    if node.cpus:
        words.append(f"--num-cpus={node.cpus:g}")
    if node.device:
        amount = max(1, node.count)
        words.append(f'--resources={{"device:{node.device}": {amount}}}')
    return words
