"""The operator's split between classes of cards: shares of tokens that hold while requests wait.

A class that is ahead of its share takes nothing until the others have caught up. Without a backlog the split says
nothing: a free instance is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp

from services.gateway.routing.fleet import Instance
from services.gateway.routing.health import State

MEMORY_S = 300.0
SLACK = 0.004  # of all tokens: how far a class may be ahead


class Split:
    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = dict(shares)
        self._tokens: dict[tuple[str, str], float] = {}  # (model, device), decayed
        self._at = 0.0
        self._barred: set[str] = set()

    def served(self, to: Instance, tokens: int, pool: Sequence[Instance], *, saturated: bool, now: float) -> None:
        """Counts what an instance was given, and bars the classes that are ahead."""
        model, device = to.endpoint.model, to.endpoint.hardware.device
        if device not in self._shares:
            return
        if now > self._at:
            factor = exp((self._at - now) / MEMORY_S)
            self._tokens = {key: value * factor for key, value in self._tokens.items()}
            self._at = now
        self._tokens[model, device] = self._tokens.get((model, device), 0.0) + tokens
        self.settle(pool, saturated=saturated)

    def settle(self, pool: Sequence[Instance], *, saturated: bool) -> None:
        able = [i for i in pool if i.endpoint.hardware.device in self._shares]
        there = {i.endpoint.hardware.device for i in able if i.state is State.HEALTHY}
        ahead: set[str] = set()
        if saturated and len(there) > 1:
            model = able[0].endpoint.model
            got = {device: self._tokens.get((model, device), 0.0) for device in there}
            total, shares = sum(got.values()), sum(self._shares[device] for device in there)
            ahead = {device for device in there if got[device] > total * (self._shares[device] / shares + SLACK)}
        for instance in able:
            instance.barred = instance.endpoint.hardware.device in ahead
