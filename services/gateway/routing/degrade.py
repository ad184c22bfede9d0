"""When a request is served by its model's fallback: under pressure, where it may be, without flapping.

The pressure of a model is the wait that a newcomer would meet. Each class has a threshold, in targets: the less a class
is the core of the business, the sooner it yields.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.routing.facts import Facts

YIELDS_AT = {"bulk": 1.0, "standard": 1.5, "core": 2.0}  # times the target
OFF = 0.5  # of the threshold: below this it is over
DWELL_S = 5.0  # at least so long on, and at least so long off


@dataclass(slots=True)
class Switch:
    on: bool = False
    since: float = float("-inf")

    def move(self, wait: float, threshold: float, now: float) -> bool:
        if now - self.since >= DWELL_S and (wait < OFF * threshold if self.on else wait > threshold):
            self.on, self.since = not self.on, now
        return self.on


def allowed(facts: Facts) -> bool:
    """What the caller said; else only bulk traffic, whose class says that it is not the core."""
    return facts.klass == "bulk" if facts.degrade is None else facts.degrade


class Pressure:
    """One switch for each model, class and target."""

    def __init__(self, ttft_s: float) -> None:
        self._ttft_s = ttft_s
        self._switches: dict[tuple[str, str, float], Switch] = {}

    def yields(self, facts: Facts, wait: float, now: float) -> bool:
        """Whether this request goes to the fallback, where `wait` seconds await it at its own model."""
        return allowed(facts) and self._switch(facts).move(wait, self._target(facts) * _yields_at(facts), now)

    def yielding(self, facts: Facts) -> bool:
        """Whether newcomers like this one go to the fallback at present."""
        return allowed(facts) and self._switch(facts).on

    def _switch(self, facts: Facts) -> Switch:
        return self._switches.setdefault((facts.model, facts.klass, self._target(facts)), Switch())

    def _target(self, facts: Facts) -> float:
        # Targets in powers of two: callers choose them, and must not make a switch each.
        target = self._ttft_s
        if facts.ttft_target_s > 0:
            while target > facts.ttft_target_s and target > 0.1:
                target /= 2
        return target


def _yields_at(facts: Facts) -> float:
    return YIELDS_AT.get(facts.klass, 1.5)
