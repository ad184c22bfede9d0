"""What an operator may say about routing, beside the endpoints' own weights. Checked by the gateway's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from zlib import crc32

from services.gateway.routing.facts import Facts

Variants = tuple[tuple[str, float], ...]  # (model, weight)


@dataclass(frozen=True, slots=True)
class Policy:
    """`split`: device -> share of tokens under saturation. `fallbacks`: model -> the one served instead where a request
    allows it. `aliases`: name -> weighted models, sticky for a session. `weights`: instance -> factor."""

    ttft_s: float = 2.0
    split: Mapping[str, float] = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, Variants] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


def resolve(variants: Variants, facts: Facts, draw: float, serves: Callable[[str], bool]) -> str:
    """The model that a request for a weighted alias gets: always the same one for a session, and one that is served if
    any is."""
    known = tuple(variant for variant in variants if serves(variant[0])) or variants
    point = crc32(f"{facts.tenant}\0{facts.session_id}".encode()) / 2**32 if facts.session_id else draw
    left = point * sum(weight for _, weight in known)
    for model, weight in known:
        left -= weight
        if left < 0:
            return model
    return known[-1][0]
