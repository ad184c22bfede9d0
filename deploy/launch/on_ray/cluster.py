"""The Ray side of it: connecting, looking, reserving. The only file that imports ray, and that when it is called."""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Sequence
from typing import Any

from deploy.launch.on_ray.choose import RayNode, View
from deploy.launch.on_ray.need import Need
from deploy.launch.on_ray.service import Service

NAMESPACE = "infermesh"
REACH_S = 3.0  # to the head's port; Ray itself would try for minutes
READY_S = 5.0  # for a placement group whose hosts have room; milliseconds, unless they have died
NODE_ID = "ray.io/node-id"
MISMATCH = re.compile(r"started with:\s+Ray: (\S+)\s+Python: (\S+)")


class ClusterFault(Exception):
    """The cluster cannot be used: why, and what to do."""


def connect(address: str) -> Any:
    """Becomes a job of the cluster. Returns ray.

    Raises:
        ClusterFault: what is wrong with it.
    """
    host, _, port = address.rpartition(":")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ClusterFault("ray is not installed here: pip install 'infermesh[ray]'") from None
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise ClusterFault(
            f"no Ray head answers at {address} ({error}): is it up (`ray status`), and is this its GCS port?"
        ) from None
    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False, logging_level="ERROR"
        )
    except Exception as error:
        raise ClusterFault(explain(str(error), address, ray.__version__, platform.python_version())) from None
    return ray


def explain(text: str, address: str, ray: str, python: str) -> str:
    """What Ray says when it cannot connect, with the way out."""
    if found := MISMATCH.search(text):
        return (
            f"the cluster at {address} runs Ray {found[1]} on Python {found[2]}, this launcher Ray {ray} on Python "
            f"{python}; Ray takes jobs of its own versions only: pip install ray=={found[1]} into a Python {found[2]} "
            f"here, or start the cluster with Ray {ray} on Python {python}"
        )
    if "Can't find a" in text or "no running" in text.lower() or "raylet" in text.lower():
        return (
            f"this host is no node of the cluster at {address}; join it, with nothing to give: ray start "
            f"--address={address} --num-cpus=0 --num-gpus=0   ({text.strip().splitlines()[0]})"
        )
    return f"the cluster at {address}: {text.strip() or 'it does not answer'}"


def view(ray: Any) -> View:
    """The living nodes, and which of our instances are on them."""
    from ray._private.state import available_resources_per_node  # vLLM's executor reads it, too; no public one is there
    from ray.util.placement_group import placement_group_table

    free = available_resources_per_node()
    members: dict[str, list[str]] = {}
    for group in placement_group_table().values():
        model, sign, id = str(group["name"]).partition("\t")
        if sign and group["state"] in ("CREATED", "RESCHEDULING"):
            for node in set(group["bundles_to_node_id"].values()):
                members.setdefault(node, []).append(f"{model}/{id}")
    nodes = [
        RayNode(
            found["NodeID"],
            found["NodeManagerAddress"],
            found["Resources"],
            free.get(found["NodeID"], {}),
            tuple(sorted(members.get(found["NodeID"], ()))),
        )
        for found in ray.nodes()
        if found["Alive"]
    ]
    order = sorted(nodes, key=lambda node: (node.address, node.id))
    return View(ray.__version__, platform.python_version(), tuple(order))


def group_name(model: str, id: str) -> str:
    return f"{model}\t{id}"


def reserve(need: Need, name: str, hosts: Sequence[RayNode]) -> Any:
    """A placement group on these hosts; None where somebody else was quicker."""
    from ray.util.placement_group import placement_group, remove_placement_group

    parts = need.bundles()
    group = placement_group(
        [resources for _, resources in parts],
        strategy="PACK" if need.spans else "STRICT_PACK",
        name=name,
        bundle_label_selector=[{NODE_ID: hosts[host].id} for host, _ in parts],
    )
    if group.wait(READY_S):
        return group
    remove_placement_group(group)
    return None


def settle(ray: Any, need: Need, group: Any, host: RayNode) -> Any:
    """The actor, in the group's first bundle."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    resources = need.bundles()[0][1]
    own = {name: amount for name, amount in resources.items() if name.startswith("device:")}
    return (
        ray.remote(Service)
        .options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            memory=resources.get("memory") or None,
            resources=own,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        .remote(host.address)
    )


def why(error: BaseException) -> str:
    """An actor's end in a line or two."""
    text = str(error).strip()
    if "ModuleNotFoundError" in text and "deploy" in text:
        return (
            "infermesh is not installed in the Python that Ray runs on that node: pip install 'infermesh[ray]' there, "
            "the same version as here"
        )
    if "node" in text and ("died" in text or "dead" in text or "terminated" in text):
        return f"its node has gone ({' '.join(text.split())[:300]})"
    return " ".join(text.split())[:600]
