"""Where embedding and rerank models go: cards that no LLM can use well, else beside the LLMs where memory allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from deploy.fleet import Instance, Model
from deploy.planner.catalogue import GIB, Card
from deploy.planner.estimate import Estimate
from deploy.planner.hosts import Host
from deploy.planner.memory import RATIO, encoder_memory, memory
from deploy.planner.place_llm import Found
from deploy.planner.placed import Placed, Tier
from deploy.planner.roofline import encoder_speed
from deploy.planner.shape import Shape
from deploy.planner.wanted import HEADROOM, Wanted

ENGINE = "sentence-transformers"
REPLICAS = 2  # processes a card: one tokenizes while the other computes (2 to 5, seed 001_9fb6dd293e332b2a.txt)
LOWEST_RATIO = 0.5


def encoder_dtype(card: Card) -> str:
    """16 bits where the card is good at them: tokens are short-lived, rounding does not add up."""
    allowed = card.generation.engines[ENGINE].dtypes
    return "fp16" if "fp16" in allowed and card.rate("fp16")[0] == "fp16" else "fp32"


def place_encoders(
    models: Sequence[tuple[Model, Shape]], found: Found, wanted: Wanted, reserved: Sequence[str] = ()
) -> list[Model]:
    """Returns those that fit nowhere. `reserved`: cards left alone while there are others."""
    if not models:
        return []
    share = wanted.encoder_rps * wanted.encoder_tokens / len(models)
    idle = [host for host in found.hosts if host.free and ENGINE in host.card.generation.engines]
    idle.sort(key=lambda host: _preference(host.card, reserved))
    homeless = []
    for index, (model, shape) in enumerate(models):
        left = len(models) - index
        if not _on_idle_cards(model, shape, idle, left, share, found, reserved) and not _beside_llms(
            model, shape, share, found
        ):
            homeless.append(model)
        idle = [next(one for one in found.hosts if one.node.name == host.node.name) for host in idle]
    return homeless


def _preference(card: Card, reserved: Sequence[str]) -> tuple[bool, bool, bool, float]:
    """Cards that no LLM wants, then those that today's vLLM cannot use, the fastest first; a CPU last."""
    rate = card.rate(encoder_dtype(card))[1]
    return card.cpu, card.name in reserved, "vllm" in card.generation.engines, -rate


def _on_idle_cards(
    model: Model,
    shape: Shape,
    idle: Sequence[Host],
    models_left: int,
    share: float,
    found: Found,
    reserved: Sequence[str],
) -> bool:
    """Cards of the first class with any: as many as the tokens need, at least a fair part of what is free there, but of
    reserved cards no more than needed."""
    for host in idle:
        if not host.free:
            continue
        alike = [one for one in idle if one.card.name == host.card.name and one.free]
        dtype = encoder_dtype(host.card)
        need = encoder_memory(shape, dtype)
        room = host.card.memory * RATIO
        if need.value > room:
            continue
        pace = encoder_speed(shape, dtype, host.card)
        free = [(one, card) for one in alike for card in one.free]
        fair = 1 if host.card.name in reserved else math.ceil(len(free) / models_left)
        cards = max(math.ceil(share * HEADROOM / pace.tokens_per_s.value), fair)
        taken = free[: min(cards, max(1, len(free) - models_left + 1))]
        replicas = 1 if host.card.cpu else max(1, min(REPLICAS, int(room // need.value)))
        note = host.card.generation.engines[ENGINE].note
        reasons = [
            f"{shape.parameters / 1e9:.2f} B parameters, {need.value / GIB:.1f} GiB a process in {dtype}: one "
            f"{host.card.name} is enough for {replicas}, and the cards that LLMs need stay theirs",
            f"{pace.tokens_per_s.value:,.0f} tokens/s a card of the {share:,.0f} asked",
        ]
        if not host.card.bf16 and not host.card.cpu:
            reasons.append(f"no bf16 on {host.card.generation.sm}, which encoders do not miss")
        if note:
            reasons.append(f"{host.card.generation.sm}: {note}")
        for one, card in taken:
            _put(model, shape, one, card, replicas, dtype, reasons, found)
            found.take(one, (card,), need.value)
        found.tiers.append(Tier(model.id, model.kind, share, len(taken) * pace.tokens_per_s.value, None, None))
        return True
    return False


def _beside_llms(model: Model, shape: Shape, share: float, found: Found) -> bool:
    """On the last cards of LLM instances, in what `vram_ratio` leaves; where that is too little the ratio is lowered
    as long as the LLM still holds a request."""
    put = 0
    for index, neighbour in enumerate(list(found.placed)):
        estimate = neighbour.estimate
        cards = neighbour.instance.cards
        host = next((one for one in found.hosts if one.node.name == neighbour.instance.node), None)
        if host is None or not cards or estimate.setup is None or estimate.memory is None:
            continue
        if ENGINE not in host.card.generation.engines or neighbour.instance.engine == "openai-http":
            continue
        dtype = encoder_dtype(host.card)
        beside = [one for one in found.placed if one.estimate.need and one.instance.node == host.node.name]
        here = sum(one.estimate.need.value for one in beside if one.estimate.need and cards[-1] in one.instance.cards)
        need = encoder_memory(shape, dtype)
        ratio = min(estimate.setup.ratio, math.floor((1 - (need.value + here) / host.card.memory) * 100) / 100)
        if ratio < LOWEST_RATIO:
            continue
        setup = replace(estimate.setup, ratio=ratio)
        assert estimate.speed is not None
        sums = memory(found.shapes[neighbour.instance.model], setup, host.card)
        if not sums.fits:
            continue
        if ratio < estimate.setup.ratio:
            reason = f"vram_ratio {ratio:g} leaves {need.value / GIB:.1f} GiB on card {cards[-1]} to {model.id}"
            told = neighbour.instance.model_copy(update={"vram_ratio": ratio})
            kept = Estimate(setup, sums, estimate.speed)
            found.placed[index] = replace(neighbour, instance=told, estimate=kept, reasons=(*neighbour.reasons, reason))
        pace = encoder_speed(shape, dtype, host.card)
        reasons = [
            f"no card is idle; beside {neighbour.instance.id}, whose engine leaves "
            f"{(1 - ratio) * host.card.memory / GIB:.1f} GiB of card {cards[-1]} (a process takes "
            f"{need.value / GIB:.1f}); an LLM keeps a card busy 85 % of the time, and the two are asked one after the "
            "other (seed 001_9fb6dd293e332b2a.txt)",
        ]
        _put(model, shape, host, cards[-1], 1, dtype, reasons, found)
        put += 1
        if put >= 2 and put * pace.tokens_per_s.value >= share * HEADROOM:
            break
    if put:
        found.tiers.append(Tier(model.id, model.kind, share, put * pace.tokens_per_s.value, None, None))
    return put > 0


def _put(
    model: Model, shape: Shape, host: Host, card: int, replicas: int, dtype: str, reasons: Sequence[str], found: Found
) -> None:
    word = "embed" if model.kind == "embedding" else "rerank"
    number = len([one for one in found.placed if one.instance.id.startswith(f"{host.node.name}-{word}")])
    told: dict[str, object] = {"id": f"{host.node.name}-{word}-{number}", "model": model.id, "node": host.node.name}
    told["replicas"] = replicas
    if not host.card.cpu:
        told["cards"] = (card,)
    pace = encoder_speed(shape, dtype, host.card)
    need = encoder_memory(shape, dtype)
    estimate = Estimate(need=need, pace=pace)
    placed = Placed(Instance.model_validate(told), tuple(reasons), estimate, rate=pace.tokens_per_s.value)
    found.placed.append(placed)
