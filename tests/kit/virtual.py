"""A router in virtual time with instances that work, stand still, fail or die as told. No clock, no chance, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from infermesh.errors import Reason
from registry.endpoint import Endpoint
from services.gateway.routing.decision import Abandon, Dispatch, Effect, Eject, Lease, Probe
from services.gateway.routing.facts import End, LoadReport, Member, Outcome
from services.gateway.routing.router import Router
from tests.kit.routing import endpoint, facts

TICK = 0.05
TOKEN_S = 0.05
FRAME_S = 0.1
PROBE_S = 1.0


@dataclass
class Behaviour:
    """`working`: its engine steps. `talking`: its process sends frames and answers probes. `failing`: every call."""

    working: bool = True
    talking: bool = True
    failing: bool = False
    counts_steps: bool = True
    stalled: set[int] = field(default_factory=set)
    steps: int = 0


@dataclass
class Virtual:
    """`log`: (time, effect) of everything the router asked for. `ends`: how each call ended."""

    router: Router
    now: float = 0.0
    instances: dict[str, Behaviour] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    log: list[tuple[float, Effect]] = field(default_factory=list)
    ends: dict[int, str] = field(default_factory=dict)
    _probes: list[tuple[float, str]] = field(default_factory=list)

    def state(self, id: str) -> str:
        return self.router.fleet.instances[id].state.value

    def states(self) -> dict[str, str]:
        return {id: instance.state.value for id, instance in self.router.fleet.instances.items()}

    def seen(self, kind: type) -> list[tuple[float, Effect]]:
        return [(at, effect) for at, effect in self.log if isinstance(effect, kind)]

    def ejected(self, id: str) -> list[float]:
        """When."""
        return [at for at, effect in self.log if isinstance(effect, Eject) and effect.instance_id == id]

    def pick(self, **given: object) -> Lease | None:
        decision = self.router.pick(facts(since=self.now, **given), self.now)
        if not isinstance(decision, Dispatch):
            return None
        lease = decision.lease
        if self.instances[lease.instance_id].failing:
            self.end(lease, End.FAILED, Reason.ENGINE_FAILED)
            return None
        self.leases[lease.seq] = lease
        self.router.heeding(lease)
        return lease

    def begin(self, lease: Lease) -> None:
        """Its first token comes."""
        self.do(self.router.started(lease, self.now))
        self._token(lease)

    def end(self, lease: Lease, end: End = End.DONE, reason: Reason | None = None) -> None:
        self.leases.pop(lease.seq, None)
        self.ends[lease.seq] = end.value
        self.do(self.router.release(lease, Outcome(end, reason), self.now))

    def run(self, seconds: float, *, asleep: bool = False) -> None:
        """`asleep`: our own loop stands still for so long, then everything comes at once."""
        until = self.now + seconds
        if asleep:
            self.now = until
            self.step()
            return
        while self.now < until - 1e-9:
            self.now += TICK
            self.step()

    def step(self) -> None:
        self.do(self.router.tick(self.now))
        beat = round(self.now / TICK)
        for at, id in [probe for probe in self._probes if self.instances[probe[1]].talking or probe[0] <= self.now]:
            self._probes.remove((at, id))
            self.do(self.router.probed(id, 1, self.instances[id].talking, self.now))
        for id, behaviour in self.instances.items():
            if behaviour.working:
                behaviour.steps += 1
                if beat % round(TOKEN_S / TICK) == 0:
                    self._tokens(id, behaviour)
            if behaviour.talking and beat % round(FRAME_S / TICK) == 0:
                steps = behaviour.steps if behaviour.counts_steps else None
                report = LoadReport(running=None, waiting=0, queued_tokens=0, steps=steps)
                self.do(self.router.report(id, 1, report, self.now))

    def do(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            self.log.append((self.now, effect))
            if isinstance(effect, Dispatch):  # somebody who waited, and has gone
                self.end(effect.lease, End.CANCELLED)
            elif isinstance(effect, Probe):
                self._probes.append((self.now + PROBE_S, effect.instance_id))
            elif isinstance(effect, Abandon) and effect.seq in self.leases:
                self.end(self.leases[effect.seq], End.LOST, Reason.INSTANCE_LOST)

    def _tokens(self, id: str, behaviour: Behaviour) -> None:
        for lease in list(self.leases.values()):
            if lease.instance_id == id and lease.seq not in behaviour.stalled and lease.pulse.tokens:
                self._token(lease)

    def _token(self, lease: Lease) -> None:
        self.router.progressed(lease, 1)
        self.router.heeding(lease)


def virtual(*ids: str | Endpoint) -> Virtual:
    """Instances that are linked and have been for a while."""
    endpoints = [endpoint(id) if isinstance(id, str) else id for id in ids]
    made = Virtual(Router(0.0))
    made.router.update([Member(e) for e in endpoints], 0.0)
    for e in endpoints:
        made.instances[e.id] = Behaviour()
        made.router.linked(e.id, e.incarnation, 0.0, beats=True)
    made.run(5.0)
    return made
