"""What an instance reserves on a Ray cluster, and which cluster that is. Pure.

A device kind is the custom resource `device:NAME`, one a card: nodes are started with
`ray start --resources='{"device:A800-80G": 8}'` (`infermesh render ray` writes these lines).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deploy.fleet import Fault, Fleet, Instance
from deploy.fleet.values import RayCluster
from deploy.launch.cards import gpus_of
from deploy.planner.catalogue import Catalogue

SLIVER = 0.001  # of a device kind, for what runs beside its cards and takes none
CPUS = 1.0  # that an instance without `resources.cpus` reserves; it may use more
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Need:
    """`hosts` hosts, each with `stages` pipeline stages of `tp` GPUs; on the first one also `cpus` and `memory` bytes
    for the service. `device`: the kind of all of them, empty = any.
    """

    hosts: int = 1
    stages: int = 1
    tp: int = 0
    cpus: float = CPUS
    memory: int = 0
    device: str = ""

    @property
    def spans(self) -> bool:
        return self.hosts > 1

    @property
    def gpus(self) -> int:
        return self.hosts * self.stages * self.tp

    def of_host(self, number: int) -> dict[str, float]:
        """What the host of this number gives."""
        gpus = self.stages * self.tp
        taken: dict[str, float] = {"GPU": gpus} if gpus else {}
        if self.device:
            taken[f"device:{self.device}"] = gpus or SLIVER
        if number == 0:
            taken |= {"CPU": self.cpus} | ({"memory": self.memory} if self.memory else {})
        return taken

    def bundles(self) -> list[tuple[int, dict[str, float]]]:
        """(host, resources) of the placement group. The first one is the service's; across hosts its GPUs are in
        bundles of one each, as vLLM's Ray executor takes them.
        """
        if not self.spans:
            return [(0, self.of_host(0))]
        card = {"GPU": 1.0} | ({f"device:{self.device}": 1.0} if self.device else {})
        service = {key: value for key, value in self.of_host(0).items() if key in ("CPU", "memory")}
        return [(0, service), *((host, card) for host in range(self.hosts) for _ in range(self.stages * self.tp))]


def need_of(fleet: Fleet, instance: Instance, gpus: int) -> Need:
    """`gpus`: the cards that it takes. More than its node has means a pipeline over several such hosts."""
    node = next((node for node in fleet.nodes if node.name == instance.node), None)
    told = instance.resources
    whole = Need(
        tp=gpus,
        cpus=told.cpus if told and told.cpus else CPUS,
        memory=int(told.memory_gib * GIB) if told and told.memory_gib else 0,
        device=node.device if node else "",
    )
    if not node or not node.count or gpus <= node.count or instance.pp == 1:
        return whole
    tp = gpus // instance.pp
    stages = max(n for n in range(1, instance.pp + 1) if instance.pp % n == 0 and n * tp <= node.count)
    return Need(instance.pp // stages, stages, tp, whole.cpus, whole.memory, whole.device)


def clusters(fleet: Fleet, asked: str) -> tuple[RayCluster, ...]:
    """The clusters in use, the default one first. `asked`: --ray, a name of the file or an address. None: no Ray.

    Raises:
        ValueError: an address that cannot be a head's.
    """
    named = {cluster.name: cluster for cluster in fleet.rayClusters}
    if not asked:
        return fleet.rayClusters
    if asked in named:
        return (named[asked], *(cluster for cluster in fleet.rayClusters if cluster.name != asked))
    if fault := address_fault(asked):
        raise ValueError(f"--ray {asked}: {fault}")
    return (RayCluster.model_construct(name=asked, headAddress=asked, pythonVersion=""), *fleet.rayClusters)


def cluster_of(fleet: Fleet, instance: Instance, found: tuple[RayCluster, ...]) -> RayCluster:
    """By name, or by index in the file; else the default one."""
    chosen = instance.ray_cluster
    if chosen is None:
        return found[0]
    if isinstance(chosen, int):
        return fleet.rayClusters[chosen] if fleet.rayClusters else found[0]
    return next(cluster for cluster in found if cluster.name == chosen)


def address_fault(address: str) -> str:
    """Why this is no head's address; empty if it can be one."""
    if address.startswith("ray://"):
        return (
            "a Ray client's address; give the head's own, HOST:6379. This host must be a node of the cluster, with "
            "nothing to give: ray start --address=HOST:6379 --num-cpus=0 --num-gpus=0"
        )
    host, colon, port = address.rpartition(":")
    return "" if colon and host and port.isdecimal() and 0 < int(port) < 65536 else "it is not HOST:PORT of a Ray head"


def ray_faults(fleet: Fleet, found: tuple[RayCluster, ...]) -> Iterator[Fault]:
    """What the file says and Ray cannot do."""
    for index, cluster in enumerate(fleet.rayClusters):
        if fault := address_fault(cluster.headAddress):
            yield Fault(f"rayClusters[{index}].headAddress", fault)
    for index, model in enumerate(fleet.models):
        if model.source.startswith(("./", "../")):
            why = "a folder seen from here; nodes need an absolute path that all of them have, or a hub name"
            yield Fault(f"models[{index}].source", f"{model.source}: {why}")
    for index, instance in enumerate(fleet.instances):
        at, device = f"instances[{index}]", _device(fleet, instance)
        if instance.ray_cluster is not None and not fleet.rayClusters and instance.ray_cluster != 0:
            yield Fault(f"{at}.ray_cluster", f"{instance.ray_cluster!r} is not there: rayClusters is empty")
        if fleet.engine_of(instance) == "vllm" and not (instance.tp or instance.cards or device or instance.resources):
            yield Fault(f"{at}.tp", "say how many GPUs it takes: tp, cards, or resources.gpus (0: it runs on the CPU)")
        if device and any(sign in device for sign in "\"'="):
            yield Fault(f"{at}.node", f"{device!r} cannot be the name of a Ray resource")


def ray_remarks(fleet: Fleet) -> Iterator[str]:
    """What of the file means something else on Ray, or nothing."""
    if any(instance.cards for instance in fleet.instances):
        yield "cards: counted; which ones they are is Ray's choice"
    if any(node.device for node in fleet.nodes):
        yield "node: a kind of host (device and count); Ray places on any that has such cards free"
    used = [key for key in ("storage", "image", "labels") if any(getattr(item, key) for item in fleet.instances)]
    if used:
        yield f"{', '.join(used)}: for containers (`infermesh render`); on Ray a node's own environment is used"


def gpus_wanted(fleet: Fleet, instance: Instance, catalogue: Catalogue) -> int:
    """Cards that it takes. A TP that stands alone counts too: it is what NUMBER_GPUS becomes."""
    told = instance.resources and instance.resources.gpus is not None
    if told or instance.tp is None or _device(fleet, instance):
        return gpus_of(fleet, instance, catalogue)
    return instance.tp * instance.pp


def _device(fleet: Fleet, instance: Instance) -> str:
    return next((node.device for node in fleet.nodes if node.name == instance.node), "")
