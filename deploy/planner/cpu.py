"""Hints for CPU hosts, by size of model (seed 000_3179620a66654959.txt, DESIGN §10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploy.planner.hosts import Host
from deploy.planner.placed import Placed
from deploy.planner.shape import Shape

# Parameters up to -> (name, cores, GiB)
ENCODERS = ((0.15e9, "small", 4, 4), (0.35e9, "base", 4, 6), (float("inf"), "large", 8, 8))
LLM_CORES = 16


def cpu_request(shape: Shape, kind: str) -> tuple[str, int, int]:
    """(class, cores, GiB) that a CPU process of this model should have."""
    if kind == "llm":
        return "LLM", LLM_CORES, round(shape.parameters * 2 / 2**30 * 1.25) + 1
    name, cores, memory = next(row[1:] for row in ENCODERS if shape.parameters <= row[0])
    return name, cores, memory


def cpu_remarks(placed: Sequence[Placed], shapes: Mapping[str, Shape], hosts: Sequence[Host]) -> list[str]:
    by_name = {host.node.name: host for host in hosts}
    lines = []
    for one in placed:
        host, shape = by_name.get(one.instance.node), shapes.get(one.instance.model)
        if host is None or shape is None or not host.card.cpu:
            continue
        kind = "llm" if one.estimate.speed else "encoder"
        name, cores, memory = cpu_request(shape, kind)
        if (host.node.cpus or 0) < cores or (host.node.memory_gib or 0) < memory:
            lines.append(
                f"{one.instance.id}: on a CPU ({name}) it wants {cores} cores and {memory} GiB, {host.node.name} has "
                f"{host.node.cpus:g} and {host.node.memory_gib:g}"
            )
        if kind == "llm":
            lines.append(f"{one.instance.id}: an LLM on a CPU is slow; AVX-512 helps, int8 and int4 do not")
    return lines
