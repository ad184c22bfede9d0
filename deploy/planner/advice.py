"""What would make a model fit or a demand be met, computed rather than recited; each with what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from deploy.planner.catalogue import GIB, Catalogue
from deploy.planner.hosts import Host
from deploy.planner.layout import QUALITY, dtype_on, engine_of, lacking, layouts
from deploy.planner.memory import Setup, memory
from deploy.planner.placed import Tier
from deploy.planner.shape import Shape, tp_fault
from deploy.planner.wanted import HEADROOM, Wanted

SMALLER = {
    "fp32": ("fp16", "int8", "int4"),
    "fp16": ("fp8", "int8", "int4"),
    "bf16": ("fp8", "int8", "int4"),
    "fp8": ("int4",),
    "int8": ("int4",),
}


def why_nowhere(shape: Shape, dtype: str, hosts: Sequence[Host], wanted: Wanted, catalogue: Catalogue) -> str:
    """The fault of a model that fits on no host: the sums, and ways out."""
    lines: list[str] = []
    seen: set[tuple[str, int]] = set()
    for host in hosts:
        if (host.card.name, len(host.free)) not in seen and host.free:
            seen.add((host.card.name, len(host.free)))
            lines.append(lacking(shape, dtype, host, wanted.short.length))
    ways = [*_smaller_weights(shape, dtype, hosts, wanted), *_cards_needed(shape, dtype, hosts, wanted)]
    ways += _other_cards(shape, dtype, wanted, catalogue, {host.card.name for host in hosts})
    return (
        f"fits nowhere ({'; '.join(lines) or 'no node has a free card'}). "
        f"Ways out: {'; '.join(ways) or 'a smaller model'}"
    )


def _smaller_weights(shape: Shape, dtype: str, hosts: Sequence[Host], wanted: Wanted) -> list[str]:
    ways = []
    for smaller in SMALLER.get(dtype, ()):
        for host in hosts:
            found = layouts(shape, smaller, host, wanted.short, ("fp16",)) if host.free else []
            if found:
                ways.append(f"{smaller} weights fit on {host.node.name} at TP{found[0].setup.tp} ({QUALITY[smaller]})")
                break
    return ways


def _cards_needed(shape: Shape, dtype: str, hosts: Sequence[Host], wanted: Wanted) -> list[str]:
    """More cards of a kind that is there."""
    ways = []
    for name in dict.fromkeys(host.card.name for host in hosts):
        host = next(one for one in hosts if one.card.name == name)
        engine = engine_of(shape, host.card)
        if not engine or host.card.cpu or not dtype_on(host.card, engine, dtype)[0]:
            continue
        for tp in (1, 2, 4, 8, 16):
            if tp <= len(host.free) or tp_fault(shape, tp, dtype):
                continue
            if memory(shape, Setup(dtype, wanted.short.length, tp, engine=engine), host.card).fits:
                ways.append(f"{tp} {name} in one host")
                break
    return ways


def _other_cards(shape: Shape, dtype: str, wanted: Wanted, catalogue: Catalogue, there: set[str]) -> list[str]:
    """The cards of the catalogue of which the fewest suffice."""
    found = []
    for card in catalogue.cards.values():
        engine = engine_of(shape, card)
        if card.name in there or card.cpu or engine != "vllm" or not dtype_on(card, engine, dtype)[0]:
            continue
        for tp in (1, 2, 4, 8):
            if not tp_fault(shape, tp, dtype) and memory(shape, Setup(dtype, wanted.short.length, tp), card).fits:
                found.append((tp, card.memory, card.name))
                break
    fewest = sorted(found)[:2]
    return [f"{tp} × {name} ({tp * size / GIB:.0f} GiB)" for tp, size, name in fewest]


def what_is_short(
    tiers: Sequence[Tier], shapes: Mapping[str, Shape], hosts: Sequence[Host], wanted: Wanted
) -> list[str]:
    """A line for each tier that takes less than is asked."""
    lines = []
    for tier in tiers:
        headroom = tier.headroom
        if headroom is None or (headroom >= 0 and tier.held):
            continue
        unit = "tokens/s" if tier.tier in ("embedding", "rerank") else "requests/s"
        under = "under the objective" if tier.held else "once the objective, which cannot be held, is let go"
        line = f"{tier.model} ({tier.tier}): {tier.capacity:,.2f} {unit} of {tier.wanted:,.2f} {under}"
        if tier.capacity > 0 and headroom < 0:
            times = tier.wanted * HEADROOM / tier.capacity
            line += f"; it takes {times:.1f} × these hosts"
            if tier.tier == "primary":
                line += f", or {_cached_share(tier):.0%} of each prompt from the prefix cache"
        shape = shapes.get(tier.model)
        if shape and tier.tier == "primary":
            line += "".join(f"; {way}" for way in _faster_weights(shape, hosts, wanted))
        lines.append(line)
    return lines


def _cached_share(tier: Tier) -> float:
    """Where prefill is what runs out, the work left to do shrinks as the cache answers more."""
    return min(0.99, max(0.0, 1 - tier.capacity / (tier.wanted * HEADROOM)))


def _faster_weights(shape: Shape, hosts: Sequence[Host], wanted: Wanted) -> list[str]:
    """8-bit weights where the card multiplies them faster."""
    ways = []
    for name in dict.fromkeys(host.card.name for host in hosts):
        host = next(one for one in hosts if one.card.name == name)
        whole = Host(host.node, host.card, tuple(range(host.node.count or 1)))
        dtype = "fp8" if "fp8" in host.card.tflops else "int8"
        if engine_of(shape, host.card) != "vllm" or dtype not in host.card.tflops or shape.dtype in ("int4", dtype):
            continue
        now = max((one.total for one in layouts(shape, shape.dtype, whole, wanted.short, ("fp16",))), default=0.0)
        then = max((one.total for one in layouts(shape, dtype, whole, wanted.short, ("fp16",))), default=0.0)
        if then > now and not math.isinf(then):
            ways.append(
                f"{dtype} weights: {then:.2f} instead of {now:.2f} requests/s a host of {name} ({QUALITY[dtype]})"
            )
    return ways
