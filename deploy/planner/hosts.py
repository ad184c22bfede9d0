"""A fleet's nodes as hosts with a card each, and which of their cards are free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deploy.fleet import Fault, Fleet, Instance, Node
from deploy.planner.catalogue import MIB, Card, Catalogue

GIB_IN_MIB = 1024
CPU_SHARE = 0.75  # of a host's memory and cores that models may have; the rest is the system's and the page cache's


@dataclass(frozen=True, slots=True)
class Host:
    """One node. `free`: indices of the cards that no instance of the file uses; a CPU host counts as one card."""

    node: Node
    card: Card
    free: tuple[int, ...]

    @property
    def nvlink(self) -> bool:
        """Told by the node; where it is not told, what the card usually comes with."""
        return self.card.nvlink_gbs > 0 and self.node.interconnect != "pcie"

    def without(self, cards: Sequence[int], used: float) -> Host:
        """What is left; processes share a CPU host until its memory is used up."""
        if self.card.cpu:
            return replace(self, card=replace(self.card, memory_mib=self.card.memory_mib - used / MIB))
        return replace(self, free=tuple(card for card in self.free if card not in cards))


def card_of(node: Node, catalogue: Catalogue) -> Card:
    """The node's card; a CPU's memory and rates are those of the whole host."""
    card = catalogue.cards[node.device]
    if not card.cpu:
        return card
    cores = (node.cpus or 1) * CPU_SHARE
    return replace(
        card,
        memory_mib=(node.memory_gib or 0) * GIB_IN_MIB * CPU_SHARE,
        tflops={dtype: rate * cores for dtype, rate in card.tflops.items()},
        sources={**card.sources, "memory_mib": f"{CPU_SHARE:g} of the node's memory_gib"},
    )


def node_faults(fleet: Fleet, catalogue: Catalogue) -> Iterator[Fault]:
    """What keeps a node from being planned with."""
    for index, node in enumerate(fleet.nodes):
        at = f"nodes[{index}]"
        if not node.device:
            yield Fault(f"{at}.device", f"is needed to plan; the catalogue has {', '.join(catalogue.cards)}")
        elif fault := catalogue.fault(node.device):
            yield Fault(f"{at}.device", fault)
        elif catalogue.cards[node.device].cpu:
            for key in ("memory_gib", "cpus"):
                if getattr(node, key) is None:
                    yield Fault(f"{at}.{key}", f"is needed to plan with {node.device}")
        elif not node.count:
            yield Fault(f"{at}.count", "is needed to plan: how many cards the host has")


def hosts_of(fleet: Fleet, catalogue: Catalogue) -> list[Host]:
    """Every node that can be planned with, in the file's order."""
    found = []
    for node in fleet.nodes:
        if node.device in catalogue.cards:
            card = card_of(node, catalogue)
            cards = range(1 if card.cpu else node.count)
            used = {index for item in fleet.instances if item.node == node.name for index in cards_used(fleet, item)}
            found.append(Host(node, card, tuple(index for index in cards if index not in used)))
    return found


def cards_used(fleet: Fleet, instance: Instance) -> tuple[int, ...]:
    """What an instance of the file takes: its cards, or where it names none as many as it needs, from the first."""
    if instance.cards:
        return instance.cards
    if fleet.model(instance.model).kind == "llm" and fleet.engine_of(instance) != "scripted":
        return tuple(range((instance.tp or 1) * instance.pp))
    return ()
