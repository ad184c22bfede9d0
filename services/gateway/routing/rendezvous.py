"""Where a prefix goes that nobody holds: weighted rendezvous, so that gateways which share nothing agree."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from xxhash import xxh3_64_intdigest

COLD_DEPTH = 4  # blocks beyond what somebody holds that name a cold prefix: 2 KiB tell documents apart


def cold_key(chain: Sequence[int], known: int) -> int:
    """What names the cold part of a prompt of which at most `known` blocks are held anywhere; 0 without a chain."""
    return chain[min(known + COLD_DEPTH, len(chain)) - 1] if chain else 0


def score(key: int, instance: str, weight: float) -> float:
    """Weighted rendezvous: every gateway that knows the same instances and weights finds the same highest score, and an
    instance is first for a share of the keys that is its share of the weights."""
    drawn = (xxh3_64_intdigest(instance.encode(), key) + 1) / (2**64 + 1)
    return -weight / log(drawn) if weight > 0 else 0.0
