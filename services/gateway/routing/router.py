"""The router: decides, reserves in the same step, and says what else that set in motion.

No I/O, no clock, no chance: `now` (seconds, monotonic) and `draw` (0 <= draw < 1) are arguments, and whatever is to be
done for somebody else comes back as effects. Equal calls give equal answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from infermesh.errors import Reason
from services.gateway.routing import membership, serving
from services.gateway.routing.admission import Bounds
from services.gateway.routing.choice import tokens
from services.gateway.routing.decision import Close, Decision, Effect, Lease, Probe, Record
from services.gateway.routing.desk import Desk
from services.gateway.routing.facts import End, Facts, LoadReport, Member, Outcome
from services.gateway.routing.fleet import Fleet
from services.gateway.routing.health import Doubt, Link
from services.gateway.routing.policy import Policy

FULL_PAUSE_S = 0.1  # an instance that refused for want of room is left alone so long, or until its next report


class Router:
    def __init__(
        self,
        now: float,
        bounds: Bounds | None = None,
        weights: Mapping[str, float] | None = None,
        policy: Policy | None = None,
    ) -> None:
        """`weights`: instance -> factor, where no whole policy is given."""
        self._desk = Desk(now, bounds or Bounds(), policy or Policy(weights=dict(weights or {})))

    # -- requests ---------------------------------------------------------------------------------------------------

    def pick(self, facts: Facts, now: float, draw: float = 0.0) -> Decision:
        """Reserves an instance, or a place in the queue."""
        return serving.pick(self._desk, facts, now, draw)

    def explain(self, facts: Facts, now: float, draw: float = 0.0) -> Record:
        """The record that `pick` would give, without reserving."""
        desk = self._desk
        facts = desk.resolve(facts, draw)
        return desk.choose(facts, desk.held(facts), now, draw).record

    def started(self, lease: Lease, now: float) -> list[Effect]:
        """The first token is out: the prompt is computed, and the next one may come."""
        instance = self.fleet.life(lease.instance_id, lease.incarnation)
        if instance is None or instance.ledger.started(lease.seq, now) is None:
            return []
        return serving.serve(self._desk, instance, now)

    def heeding(self, lease: Lease) -> None:
        """The next event of its stream is waited for. Silence counts from here to `progressed`."""
        lease.pulse.heed(self._desk.awake.now)

    def progressed(self, lease: Lease, tokens: int) -> None:
        """An event of its stream came, with so many tokens. Both are called for each event: under 1 µs together."""
        lease.pulse.beat(tokens, self._desk.awake.now)

    def release(self, lease: Lease, outcome: Outcome, now: float) -> list[Effect]:
        """Gives the reservation back. A second release of the same lease does nothing."""
        instance = self.fleet.life(lease.instance_id, lease.incarnation)
        if instance is None:
            return []
        entry = instance.ledger.release(lease.seq, now)
        if entry is None:
            return []
        effects: list[Effect] = []
        self._desk.learn(instance, lease, entry, outcome, now)
        if outcome.reason in (Reason.INSTANCE_FULL, Reason.STARTING):
            instance.full_until = now + FULL_PAUSE_S
        elif outcome.reason is Reason.DRAINING:
            instance.voices.draining = True
        if outcome.end is End.LOST and instance.voices.doubt is Doubt.NONE:
            instance.voices.doubt = Doubt.PROBING
            effects.append(Probe(instance.id))
        life = (lease.instance_id, lease.incarnation)
        if life in self.fleet.leaving:
            if not instance.ledger.entries:
                del self.fleet.leaving[life]
                effects.append(Close(*life))
            return effects
        return effects + membership.refresh(self._desk, instance, f"a call was lost: {outcome.reason}", now)

    def cancel(self, ticket: int, now: float) -> list[Effect]:
        """The caller of a waiting request has gone. An unknown ticket is no error: its effect may be under way."""
        self._desk.queue.remove(ticket)
        return []

    def tick(self, now: float) -> list[Effect]:
        """What time alone does: waits that end, pauses that are over, instances nobody vouches for. To be called every
        50 ms, and again at once while it has effects: one call ends only some of the waits."""
        self._desk.awake.tick(now)
        effects = serving.expire(self._desk, now)
        for instance in [i for i in self.fleet.instances.values() if i.voices.over(now)]:
            effects += membership.retire(self._desk, instance, "no longer registered")
        return effects + serving.serve_all(self._desk, now)

    # -- the fleet --------------------------------------------------------------------------------------------------

    def update(
        self, members: Iterable[Member], now: float, *, young: bool = False, stale: bool = False
    ) -> list[Effect]:
        """The directory's whole content. Unchanged lives keep everything; a stale directory removes nobody."""
        return membership.update(self._desk, members, now, young=young, stale=stale)

    def linked(self, id: str, incarnation: int, now: float) -> list[Effect]:
        """The Link to this life stands and its hello was right."""
        return membership.hear(self._desk, id, incarnation, "", now, link=Link.UP, doubt=Doubt.NONE)

    def unlinked(self, id: str, incarnation: int, why: str, now: float) -> list[Effect]:
        """The Link broke, or cannot be made."""
        instance = self.fleet.life(id, incarnation)
        if instance is not None:
            instance.ledger.forget_report()
        return membership.hear(self._desk, id, incarnation, why, now, link=Link.DOWN)

    def draining(self, id: str, incarnation: int, now: float) -> list[Effect]:
        """The instance takes no new work and finishes what it has."""
        return membership.hear(self._desk, id, incarnation, "draining", now, draining=True)

    def goodbye(self, id: str, incarnation: int, now: float) -> list[Effect]:
        """The instance left of its own will."""
        return membership.hear(self._desk, id, incarnation, "goodbye", now, link=Link.DOWN, registered=False)

    def probed(self, id: str, incarnation: int, well: bool, now: float) -> list[Effect]:
        """The answer to a Probe."""
        doubt = Doubt.NONE if well else Doubt.FAILED
        return membership.hear(self._desk, id, incarnation, "the probe failed", now, doubt=doubt)

    def report(self, id: str, incarnation: int, load: LoadReport, now: float) -> list[Effect]:
        """A load frame; room it shows goes to whoever waits. One that failed a probe is asked again: it lives."""
        instance = self.fleet.instances.get(id)
        if instance is None or instance.endpoint.incarnation != incarnation:
            return []
        instance.ledger.reconcile(load, now, instance.rates.tps)
        instance.full_until = 0.0
        if instance.voices.doubt is Doubt.FAILED:
            return [Probe(id)]
        return serving.serve(self._desk, instance, now)

    def cached(
        self,
        id: str,
        incarnation: int,
        added: Iterable[int],
        removed: Iterable[int],
        *,
        snapshot: bool = False,
        epoch: int = 0,
    ) -> None:
        """A cache frame: which blocks of prefix chains the instance holds, by its own word."""
        instance = self.fleet.instances.get(id)
        if instance is not None and instance.endpoint.incarnation == incarnation:
            self._desk.index.cache_frame(id, added, removed, snapshot, epoch)

    # -- what others may ask ----------------------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        return self._desk.fleet

    @property
    def waiting(self) -> int:
        return len(self._desk.queue.tickets)

    def estimate(self, facts: Facts) -> tuple[int, int]:
        """Tokens of prompt and of answer that the request is thought to need."""
        facts = replace(facts, slots=1) if not facts.slots else facts
        return tokens(facts, self._desk.estimate(facts))
