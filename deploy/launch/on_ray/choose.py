"""Which nodes of a Ray cluster an instance gets, or what is missing where. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.launch.on_ray.need import GIB, SLIVER, Need

SLACK = 1e-6  # Ray counts in 1/10,000


@dataclass(frozen=True, slots=True)
class RayNode:
    """A living node. `members`: "MODEL/ID" of our instances there. Memory in bytes."""

    id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """A cluster as it is now."""

    ray: str
    python: str
    nodes: tuple[RayNode, ...]


def choose(need: Need, model: str, nodes: Sequence[RayNode], avoid: str = "") -> tuple[RayNode, ...]:
    """A host for each part, the service's first; empty: there is no room. `avoid`: a node that is taken only where no
    other one fits.

    Instances of one model go to different nodes where that is possible, so that a node's death does not take all of
    them; then to the node with the fewest instances of any.
    """

    def rank(node: RayNode) -> tuple[bool, int, int, float, str]:
        same = sum(member.rpartition("/")[0] == model for member in node.members)
        return node.id == avoid, same, len(node.members), -node.free.get("CPU", 0.0), node.id

    chosen: list[RayNode] = []
    for number in range(need.hosts):
        fit = [node for node in nodes if node not in chosen and not lacks(need.of_host(number), node.free)]
        if not fit:
            return ()
        chosen.append(min(fit, key=rank))
    return tuple(chosen)


def lacks(wanted: Mapping[str, float], there: Mapping[str, float]) -> list[str]:
    """The resources of which there is not enough."""
    return [name for name, amount in wanted.items() if there.get(name, 0.0) < amount - SLACK]


def missing(need: Need, nodes: Sequence[RayNode]) -> str:
    """Why there is no room: what is wanted, what each node lacks of it, and what to do. One line."""
    wanted = need.of_host(0)
    hosts = f"{need.hosts} hosts, each with {_told(need.of_host(1))}" if need.spans else _told(wanted)
    if not nodes:
        return f"needs {hosts}; the cluster has no node"
    tells, never = [], True
    for node in nodes:
        busy, absent = lacks(wanted, node.free), lacks(wanted, node.total)
        never = never and bool(absent)
        parts = [
            f"{_amount(name, node.free.get(name, 0.0))} of {_amount(name, node.total.get(name, 0.0))} {name} free"
            for name in busy
        ]
        tells.append(f"{node.address}: {', '.join(parts) or 'has room'}")
    return f"needs {hosts}; {'; '.join(tells)}; {_advice(wanted, nodes, never, need)}"


def _advice(wanted: Mapping[str, float], nodes: Sequence[RayNode], never: bool, need: Need) -> str:
    if not never:
        few = len([node for node in nodes if not lacks(wanted, node.total)])
        if few < need.hosts:
            return f"add {need.hosts - few} such node(s): ray start --address=… {_flags(wanted)}"
        return "it starts as soon as that is free: stop what holds it, or add a node"
    unknown = [name for name in wanted if name.startswith("device:") and not any(name in node.total for node in nodes)]
    if unknown:
        return f"no node says that it has such cards: start theirs with ray start --address=… {_flags(wanted)}"
    return f"no node is large enough: add one that is (ray start --address=… {_flags(wanted)}), or ask for less"


def _flags(wanted: Mapping[str, float]) -> str:
    """How a host that has all of it is started."""
    cards = int(wanted.get("GPU", 0))
    device = next((name for name in wanted if name.startswith("device:")), "")
    flags = [f"--num-gpus={cards}"] if cards else []
    flags += [f"--resources='{{\"{device}\": {cards or 1}}}'"] if device else []
    return " ".join(flags)


def _told(wanted: Mapping[str, float]) -> str:
    return ", ".join(
        f"a host with {name}" if amount == SLIVER else f"{_amount(name, amount)} {name}"
        for name, amount in wanted.items()
    )


def _amount(name: str, amount: float) -> str:
    return f"{amount / GIB:.1f} GiB" if name == "memory" else f"{amount:g}"
