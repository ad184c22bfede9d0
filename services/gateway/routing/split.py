"""The operator's split between classes of cards: shares of tokens that hold under saturation.

A class that is ahead of its share takes nothing while, in the line of one that is not, somebody waits past the
objective: then there is not enough for all, and the operator's word decides. A line that moves in time is no
saturation, and a class that nobody waits for will not catch up; then a free instance is used.

Barring a class makes the others' lines longer, and could keep up by itself the saturation that it answers. So the time
that barred instances stand idle is kept: once it would have been enough for all that waits, the fleet is not too small,
only divided, and it is undivided for as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp

from services.gateway.routing.fleet import Instance
from services.gateway.routing.health import State

MEMORY_S = 300.0
SLACK = 0.004  # of all tokens: how far a class may be ahead


@dataclass(slots=True)
class Idle:
    """`seconds` of prompts that barred instances of a model could have computed. `spent`: they are being given back."""

    seconds: float = 0.0
    spent: bool = False
    at: float = 0.0


class Split:
    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = dict(shares)
        self._tokens: dict[tuple[str, str], float] = {}  # (model, device), decayed
        self._at = 0.0
        self._idle: dict[str, Idle] = {}

    def served(self, to: Instance, tokens: int, pool: Sequence[Instance], now: float) -> None:
        """Counts what an instance was given."""
        model, device = to.endpoint.model, to.endpoint.hardware.device
        if device not in self._shares:
            return
        if now > self._at:
            factor = exp((self._at - now) / MEMORY_S)
            self._tokens = {key: value * factor for key, value in self._tokens.items()}
            self._at = now
        self._tokens[model, device] = self._tokens.get((model, device), 0.0) + tokens
        self.settle(pool, now)

    def settle(self, pool: Sequence[Instance], now: float) -> None:
        """Bars the classes that are ahead, as long as others are behind."""
        able = [i for i in pool if i.endpoint.hardware.device in self._shares]
        there = {i.endpoint.hardware.device for i in able if i.state is State.HEALTHY}
        if len(there) < 2:
            for instance in able:
                instance.barred = False
            return
        model = able[0].endpoint.model
        got = {device: self._tokens.get((model, device), 0.0) for device in there}
        total, shares = sum(got.values()), sum(self._shares[device] for device in there)
        ahead = {device for device in there if got[device] > total * (self._shares[device] / shares + SLACK)}
        late = any(i.line.late for i in able if i.endpoint.hardware.device not in ahead)
        undivided = self._undivided(self._idle.setdefault(model, Idle(at=now)), able, late, now)
        for instance in able:
            instance.barred = late and not undivided and instance.endpoint.hardware.device in ahead

    def _undivided(self, idle: Idle, able: Sequence[Instance], late: bool, now: float) -> bool:
        passed, idle.at = now - idle.at, now
        if not late:
            idle.seconds, idle.spent = 0.0, False
        elif idle.spent:
            idle.seconds -= passed
            idle.spent = idle.seconds > 0
        else:
            idle.seconds += passed * sum(i.barred and i.ledger.wait_s(now) <= 0 for i in able)
            idle.spent = idle.seconds > sum(i.busy_s() for i in able)
        return idle.spent
