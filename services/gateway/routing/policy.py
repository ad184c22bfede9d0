"""What an operator may say about routing, beside the endpoints' own weights. Checked by the gateway's settings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from zlib import crc32

from services.gateway.routing.facts import Facts
from services.gateway.routing.scaling import USUAL, Between, Law

Variants = tuple[tuple[str, float], ...]  # (model, weight)


@dataclass(frozen=True, slots=True)
class Policy:
    """`split`: device -> share of tokens under saturation. `fallbacks`: model -> the one served instead where a request
    allows it. `aliases`: name -> weighted models, sticky for a session. `weights`: instance -> factor. `ttft_s` and
    `tpot_ms` (0 = none): the objective. `scale`: group of instances -> how many replicas it may have, by `law`."""

    ttft_s: float = 2.0
    split: Mapping[str, float] = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, Variants] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    tpot_ms: float = 0.0
    scale: Mapping[str, Between] = field(default_factory=dict)
    law: Law = USUAL


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


def may_serve(names: Collection[str], model: str, own: Collection[str], aliases: Mapping[str, Variants]) -> bool:
    """Whether a caller whose key is for `names` (empty = all) may be served by a model that has the aliases `own`:
    named by its id or one of those, or behind a weighted alias of the key."""
    if not names or model in names or any(alias in names for alias in own):
        return True
    return any(model == variant for name in names for variant, _ in aliases.get(name, ()))
