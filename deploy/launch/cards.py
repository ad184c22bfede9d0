"""How many cards an instance takes. Pure."""

from __future__ import annotations

from deploy.fleet import Fleet, Instance
from deploy.planner.catalogue import Catalogue


def gpus_of(fleet: Fleet, instance: Instance, catalogue: Catalogue) -> int:
    """Cards that it takes: `resources.gpus`, its `cards`, else TP × PP, or one for an encoder on a node with GPUs."""
    if fleet.engine_of(instance) in ("scripted", "openai-http"):
        return 0
    if instance.resources and instance.resources.gpus is not None:
        return instance.resources.gpus
    if instance.cards:
        return len(instance.cards)
    device = next((node.device for node in fleet.nodes if node.name == instance.node), "")
    card = catalogue.cards.get(device)
    if not device or (card and card.cpu):
        return 0
    return (instance.tp or 1) * instance.pp
