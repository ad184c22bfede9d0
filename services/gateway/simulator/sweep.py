"""Many runs: policies × rates. Each run has a seed of its own, so that its numbers do not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.gateway.routing.admission import Bounds
from services.gateway.simulator.fidelity import error
from services.gateway.simulator.fleet import Site
from services.gateway.simulator.metrics import summary
from services.gateway.simulator.ours import PATIENT
from services.gateway.simulator.policies import policy
from services.gateway.simulator.policy import Chance
from services.gateway.simulator.trace import Trace
from services.gateway.simulator.world import Conditions, simulate


@dataclass(slots=True)
class Sweep:
    """`chance` makes a fresh source from a seed. Runs are remembered: a capacity search asks twice."""

    trace: Trace
    site: Site
    conditions: Conditions
    chance: Callable[[int], Chance]
    seed: int = 0
    bounds: Bounds = PATIENT
    _known: dict[tuple[str, float], dict[str, Any]] = field(default_factory=dict)

    def run(self, name: str, rate: float) -> dict[str, Any]:
        """The summary of one policy at one rate."""
        found = self._known.get((name, rate))
        if found is None:
            trace = self.trace.at_rate(rate)
            run = simulate(trace, self.site, policy(name, self.bounds), self.conditions, self.chance(self.seed))
            found = summary(run, self.site)
            if rate == 1 and (apart := error(run)) is not None:  # faster or slower was not measured
                found["error"] = apart
            self._known[name, rate] = found
        return found

    def mean_ttft(self, name: str, rate: float) -> float:
        """Seconds; infinite where anybody was left without an answer that others might have had."""
        said = self.run(name, rate)
        mean = said["ttft_mean_s"]
        return float("inf") if mean is None or said["completed"] + said["shed"] < said["requests"] else float(mean)
