"""Is everything there to place a fleet on its Ray clusters? Asked before anything is started."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import platform
from collections.abc import Iterator, Mapping, Sequence

from deploy.fleet.values import RayCluster
from deploy.launch.on_ray.choose import RayNode, View, missing
from deploy.launch.on_ray.need import Need

LOOK = ("-P", "-m", "deploy.launch.on_ray.look")


async def survey(python: str, found: Sequence[RayCluster]) -> dict[str, View]:
    """Every cluster by its name. `python`: the interpreter that this host's children take.

    Raises:
        ValueError: those that cannot be used, a line each, with the way out.
    """
    ours = platform.python_version()
    faults = [fault for cluster in found if (fault := version_fault(cluster, ours))]
    if faults:
        raise ValueError("\n".join(faults))
    views = await asyncio.gather(*(look(python, cluster.headAddress) for cluster in found), return_exceptions=True)
    for cluster, view in zip(found, views, strict=True):
        if isinstance(view, ValueError):
            faults.append(f"{cluster.name}: {view}")
        elif isinstance(view, BaseException):
            raise view
    if faults:
        raise ValueError("\n".join(faults))
    return {cluster.name: view for cluster, view in zip(found, views, strict=True) if isinstance(view, View)}


async def look(python: str, address: str) -> View:
    """
    Raises:
        ValueError: why it cannot be looked at.
    """
    asked = await asyncio.create_subprocess_exec(
        *(python, *LOOK, address),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    answer, errors = await asked.communicate()
    if asked.returncode:
        raise ValueError(errors.decode("utf-8", "replace").strip()[-2000:] or f"look ended with {asked.returncode}")
    return view_of(answer.decode())


def view_of(text: str) -> View:
    raw = json.loads(text)
    nodes = (RayNode(**{**node, "members": tuple(node["members"])}) for node in raw["nodes"])
    return View(raw["ray"], raw["python"], tuple(nodes))


def version_fault(cluster: RayCluster, ours: str) -> str:
    """Where the file tells the cluster's Python, the network need not be asked."""
    theirs = cluster.pythonVersion
    if not theirs or ours == theirs or ours.startswith(f"{theirs}."):
        return ""
    return (
        f"rayClusters {cluster.name}: its Python is {theirs}, this launcher's is {ours}, and Ray takes jobs of its own "
        f"Python only: run `infermesh up` in Python {theirs} (infermesh takes 3.11 to 3.14), or start the cluster in "
        f"Python {ours} and correct pythonVersion"
    )


def reach_faults(views: Mapping[str, View], registry: str, grpc: str, *, closed: bool) -> Iterator[str]:
    """Nodes on other hosts have to reach the registry here, and are reached by everybody. `registry`: where the one
    hosted here listens, empty where it is elsewhere. `grpc`: the gateway's address, which stands in the registry.
    `closed`: keys are set, or it is open on purpose.
    """
    far = sorted(
        {node.address for view in views.values() for node in view.nodes if not is_loopback(node.address)},
    )
    if not far:
        return
    few = ", ".join(far[:3]) + (" …" if len(far) > 3 else "")
    if registry and is_loopback(registry.rpartition(":")[0]):
        yield (
            f"Ray nodes ({few}) cannot reach the registry at {registry}: --registry consul://HOST:PORT, or host it "
            "where they do: --registry-listen THIS_HOST:50049"
        )
    if registry and is_loopback(grpc.rpartition(":")[0]):
        yield f"the gateway at {grpc} cannot be dialled from other hosts: --grpc THIS_HOST:50050"
    if not closed:
        yield (
            f"instances on Ray nodes ({few}) listen beyond loopback: give --keys and --operator-key-file, or --insecure"
        )


def remarks(views: Mapping[str, View], wanted: Mapping[str, tuple[RayCluster, Need]]) -> Iterator[str]:
    """A line a cluster, and one for each instance that has no room now."""
    for name, view in views.items():
        yield f"Ray cluster {told(name, view)}"
    for id, (cluster, need) in wanted.items():
        nodes_of = views[cluster.name].nodes
        fits = sum(all(node.total.get(k, 0) >= v for k, v in need.of_host(0).items()) for node in nodes_of)
        if fits < need.hosts:
            yield f"{id} will be pending: {missing(need, nodes_of)}"


def told(name: str, view: View) -> str:
    """A cluster in a line."""
    nodes = ", ".join(f"{node.address} ({_resources(node)})" for node in view.nodes)
    return f"{name}: Ray {view.ray}, Python {view.python}, {len(view.nodes)} nodes: {nodes}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _resources(node: RayNode) -> str:
    shown = [name for name in node.total if name in ("CPU", "GPU") or name.startswith("device:")]
    return ", ".join(f"{node.total[name]:g} {name}" for name in sorted(shown))
