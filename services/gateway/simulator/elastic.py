"""A simulated mesh whose groups grow and shrink as the gateways say: instances join after a start-up and leave by
draining, as a Deployment or the Ray launcher would have it.

What is read is the highest opinion of all gateways, at the pace at which an autoscaler polls. Who is ordered is paid
from then on; who is ordered no more before it serves is called off, the youngest first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.endpoint import Endpoint
from services.gateway.simulator.fleet import Site, replica
from services.gateway.simulator.ours import RouterGateway
from services.gateway.simulator.policy import Chance, Policy
from services.gateway.simulator.trace import Trace
from services.gateway.simulator.world import Conditions, Run, World

_SCALE, _JOIN = 100, 101  # beside the events of the world


@dataclass(frozen=True, slots=True)
class Elastic:
    """`start_s`: from the order of an instance until it serves. `check_s`: how often the gateways are asked."""

    start_s: float
    check_s: float = 15.0


@dataclass(slots=True)
class Life:
    """One instance from its order to its end, in virtual seconds. `joined`, `left`, `gone` < 0: not yet."""

    endpoint: Endpoint
    ordered: float
    joined: float = -1.0
    left: float = -1.0  # it began to drain
    gone: float = -1.0

    @property
    def stays(self) -> bool:
        return self.left < 0 and self.gone < 0


@dataclass(frozen=True, slots=True)
class Elapsed:
    """A run and the lives of all its instances."""

    run: Run
    lives: tuple[Life, ...]

    @property
    def instance_s(self) -> float:
        """Seconds of all instances, those that loaded or drained included."""
        return sum(self._seconds(life) for life in self.lives)

    def instance_s_of(self, group: str) -> float:
        return sum(self._seconds(life) for life in self.lives if life.endpoint.group == group)

    def _seconds(self, life: Life) -> float:
        return (life.gone if life.gone >= 0 else self.run.end) - life.ordered

    def most(self) -> int:
        """The highest number of instances at a time."""
        moments = [(life.ordered, 1) for life in self.lives] + [
            (life.gone, -1) for life in self.lives if life.gone >= 0
        ]
        here = most = 0
        for _, step in sorted(moments):
            here += step
            most = max(most, here)
        return most


class ElasticWorld(World):
    def __init__(
        self, trace: Trace, site: Site, policy: Policy, conditions: Conditions, chance: Chance, elastic: Elastic
    ) -> None:
        """`site`: one endpoint for each group. Every group begins with its least number.

        Raises:
            ValueError: the policy's gateways say nothing of sizes.
        """
        started = site.staffed({name: between.least for name, between in site.scale.items()})
        super().__init__(trace, started, policy, conditions, chance)
        self._elastic = elastic
        self._models = {endpoint.group: endpoint for endpoint in site.endpoints if endpoint.group}
        self.lives = [Life(endpoint, 0.0, joined=0.0) for endpoint in started.endpoints]
        self._numbers = {name: between.least for name, between in site.scale.items()}
        self._routers = [gateway for gateway in self._gateways if isinstance(gateway, RouterGateway)]
        if len(self._routers) < len(self._gateways):
            raise ValueError(f"{policy.name} does not say how many instances there should be")

    def _start_timers(self) -> None:
        super()._start_timers()
        self._at(self._elastic.check_s, _SCALE, None)

    def _happen(self, what: int, about: Any, now: float) -> None:
        if what == _SCALE:
            self._scale(now)
            self._at(now + self._elastic.check_s, _SCALE, None)
        elif what == _JOIN:
            if about.stays:
                self._join(about, now)
        else:
            super()._happen(what, about, now)

    def _scale(self, now: float) -> None:
        opinions = [router.desired() for router in self._routers]
        for name in self._models:
            wanted = max((opinion[name] for opinion in opinions if name in opinion), default=0)
            here = [life for life in self.lives if life.endpoint.group == name and life.stays]
            for _ in range(wanted - len(here)):
                self._order(name, now)
            for life in here[::-1][: len(here) - wanted] if 0 < wanted < len(here) else ():
                self._leave(life, now)
        for life in self.lives:
            if life.left >= 0 > life.gone and life.left < now and self._engines[life.endpoint.id].segment is None:
                self._end(life, now)

    def _order(self, name: str, now: float) -> None:
        endpoint = replica(self._models[name], self._numbers[name])
        self._numbers[name] += 1
        life = Life(endpoint, now)
        self.lives.append(life)
        self._at(now + self._elastic.start_s, _JOIN, life)

    def _join(self, life: Life, now: float) -> None:
        life.joined = now
        id = life.endpoint.id
        self._put(life.endpoint)
        for number, router in enumerate(self._routers):
            self._carry(router.joined(life.endpoint, now), number, now)
        self._report(id, self._timers[id], now)

    def _leave(self, life: Life, now: float) -> None:
        if life.joined < 0:
            life.gone = now
            return
        life.left = now
        for number, router in enumerate(self._routers):
            self._carry(router.draining(life.endpoint, now), number, now)

    def _end(self, life: Life, now: float) -> None:
        life.gone = now
        self._timers[life.endpoint.id] += 1  # it reports no more
        for number, router in enumerate(self._routers):
            self._carry(router.gone(life.endpoint, now), number, now)


def simulate_elastic(
    trace: Trace, site: Site, policy: Policy, conditions: Conditions, chance: Chance, elastic: Elastic
) -> Elapsed:
    """One run. `chance` is used by this run alone."""
    world = ElasticWorld(trace, site, policy, conditions, chance, elastic)
    return Elapsed(world.run(), tuple(world.lives))


def simulate_fixed(
    trace: Trace, site: Site, policy: Policy, conditions: Conditions, chance: Chance, counts: Mapping[str, int]
) -> Elapsed:
    """The same with so many replicas of each group from beginning to end."""
    staffed = site.staffed(counts)
    run = World(trace, staffed, policy, conditions, chance).run()
    return Elapsed(run, tuple(Life(endpoint, 0.0, joined=0.0) for endpoint in staffed.endpoints))
