"""The router: decides, reserves in the same step, and says what else that set in motion.

No I/O, no clock, no chance: `now` (seconds, monotonic) and `draw` (0 <= draw < 1) are arguments, and whatever is to be
done for somebody else comes back as effects. Equal calls give equal answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from infermesh.errors import Reason
from services.gateway.routing import asking, judge, membership, serving, watch
from services.gateway.routing.admission import Bounds
from services.gateway.routing.choice import tokens
from services.gateway.routing.decision import Ask, Close, Decision, Effect, Lease, Record
from services.gateway.routing.desk import Desk
from services.gateway.routing.facts import Facts, LoadReport, Member, Outcome
from services.gateway.routing.fleet import NOBODY, Fleet, Instance
from services.gateway.routing.groups import GroupView
from services.gateway.routing.health import Cause, Link, Standing
from services.gateway.routing.policy import Policy

FULL_PAUSE_S = 0.1  # an instance that refused for want of room is left alone so long, or until its next report


class Router:
    def __init__(
        self,
        now: float,
        bounds: Bounds | None = None,
        weights: Mapping[str, float] | None = None,
        policy: Policy | None = None,
        salt: str = "",
    ) -> None:
        """`weights`: instance -> factor, where no whole policy is given. `salt`: this gateway's own, for the jitter of
        ejections."""
        self._desk = Desk(now, bounds or Bounds(), policy or Policy(weights=dict(weights or {})), salt)

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
        if outcome.reason is Reason.INSTANCE_FULL and instance.shared and not lease.grant:
            instance.ledger.refused(outcome.queued_s, now)  # it was not asked; for the next attempt, it is
            instance.closed = True
        elif outcome.reason in (Reason.INSTANCE_FULL, Reason.STARTING):
            instance.full_until = now + FULL_PAUSE_S
        elif outcome.reason is Reason.DRAINING:
            instance.voices.draining = True
        life = (lease.instance_id, lease.incarnation)
        if life in self.fleet.leaving:
            if not instance.ledger.entries:
                del self.fleet.leaving[life]
                effects.append(Close(*life))
            return effects
        effects += judge.ended(self._desk, instance, lease, entry, outcome, now)
        effects += judge.update(self._desk, instance, Cause.LEFT, "it drains", now)
        return membership.follow(self._desk, instance, effects, now)

    def cancel(self, ticket: int, now: float) -> list[Effect]:
        """The caller of a waiting request has gone. An unknown ticket is no error: its effect may be under way."""
        self._desk.queue.remove(ticket)
        return []

    def tick(self, now: float) -> list[Effect]:
        """What time alone does: waits that end, pauses that are over, instances nobody vouches for. To be called every
        50 ms, and again at once while it has effects: one call ends only some of the waits."""
        self._desk.awake.tick(now)
        self._desk.index.settle()
        effects = serving.expire(self._desk, now)
        for instance in [i for i in self.fleet.instances.values() if i.voices.over(now)]:
            effects += membership.retire(self._desk, instance, "no longer registered", now)
        if looked := watch.look(self._desk, now):
            effects += looked
            for instance in list(self.fleet.instances.values()):
                if instance.state is not instance.settled:
                    effects += membership.follow(self._desk, instance, [], now)
        effects += serving.serve_all(self._desk, now)
        self._desk.groups.look(self.fleet, now)
        self._desk.queue.touched.update(self._desk.queue.homes)
        return effects

    # -- the fleet --------------------------------------------------------------------------------------------------

    def update(
        self, members: Iterable[Member], now: float, *, young: bool = False, stale: bool = False
    ) -> list[Effect]:
        """The directory's whole content. Unchanged lives keep everything; a stale directory removes nobody."""
        return membership.update(self._desk, members, now, young=young, stale=stale)

    def linked(
        self,
        id: str,
        incarnation: int,
        now: float,
        *,
        beats: bool = False,
        grants: bool = False,
        preempts: bool = False,
    ) -> list[Effect]:
        """The Link to this life stands and its hello was right; if it drains, it says so next. `beats`: it promised a
        frame a second at least; `grants`: it arbitrates between gateways, and does not know yet who waits here;
        `preempts`: shorter prompts overtake longer ones there."""
        instance = self.fleet.instances.get(id)
        effects: list[Effect] = []
        if instance is not None and instance.endpoint.incarnation == incarnation:
            instance.beats, instance.heard, instance.stepped = beats, self._desk.awake.now, None
            instance.grants, instance.told, instance.closed = grants, NOBODY, False
            instance.ledger.preempts = preempts
            if instance.voices.standing is Standing.DOUBTED and instance.voices.cause in (Cause.LOST, Cause.SILENT):
                effects = judge.cleared(self._desk, instance, now)
        return effects + membership.hear(self._desk, id, incarnation, "", now, link=Link.UP, draining=False)

    def unlinked(self, id: str, incarnation: int, why: str, now: float) -> list[Effect]:
        """The Link broke, or cannot be made."""
        instance = self.fleet.life(id, incarnation)
        if instance is not None:
            instance.ledger.forget_report()
            instance.line.hear((), 0)
            instance.grants = False
        return membership.hear(self._desk, id, incarnation, why, now, link=Link.DOWN)

    def draining(self, id: str, incarnation: int, now: float) -> list[Effect]:
        """The instance takes no new work and finishes what it has."""
        return membership.hear(self._desk, id, incarnation, "draining", now, Cause.LEFT, draining=True)

    def goodbye(self, id: str, incarnation: int, now: float) -> list[Effect]:
        """The instance left of its own will."""
        said = {"link": Link.DOWN, "registered": False, "draining": True}
        return membership.hear(self._desk, id, incarnation, "goodbye", now, Cause.LEFT, **said)

    def ban(self, bans: Mapping[str, str], now: float) -> list[Effect]:
        """The operator's whole word: instance -> who banned it and why. Nobody else is banned."""
        return membership.ban(self._desk, bans, now)

    def probed(self, id: str, incarnation: int, well: bool, now: float) -> list[Effect]:
        """The answer to a Probe."""
        instance = self.fleet.instances.get(id)
        if instance is None or instance.endpoint.incarnation != incarnation:
            return []
        effects = judge.probed(self._desk, instance, well, now)
        if instance.voices.over(now):
            effects += membership.retire(self._desk, instance, "the probe failed", now)
            return effects + membership.settle(self._desk, now)
        return membership.follow(self._desk, instance, effects, now)

    def report(self, id: str, incarnation: int, load: LoadReport, now: float) -> list[Effect]:
        """A load frame; room it shows goes to whoever waits."""
        instance = self.fleet.instances.get(id)
        if instance is None or instance.endpoint.incarnation != incarnation:
            return []
        self._heard(instance, load)
        instance.ledger.reconcile(load, now, instance.rates.tps)
        instance.line.hear(load.foreign_line_ms, load.foreign_waiting)
        instance.full_until, instance.closed = 0.0, False
        if instance.line.count and instance.shared and not instance.told.ticket:
            self._desk.queue.touched.add(id)
        return serving.serve(self._desk, instance, now)

    def granted(self, id: str, incarnation: int, ticket: int, now: float) -> list[Effect]:
        """The instance has room for one of those who wait for it here."""
        instance = self.fleet.instances.get(id)
        if instance is None or instance.endpoint.incarnation != incarnation:
            return []
        return asking.granted(self._desk, instance, ticket, now)

    def asks(self, now: float) -> list[Ask]:
        """What instances are to be told of who waits here. To be called after every other call, and sent at once."""
        return asking.asks(self._desk, now) if self._desk.queue.touched else []

    def cached(
        self,
        id: str,
        incarnation: int,
        added: Sequence[int],
        removed: Iterable[int],
        *,
        snapshot: bool = False,
        epoch: int = 0,
    ) -> None:
        """A cache frame: which blocks of prefix chains the instance holds, by its own word."""
        instance = self.fleet.instances.get(id)
        if instance is not None and instance.endpoint.incarnation == incarnation:
            instance.heard = self._desk.awake.now
            self._desk.index.cache_frame(id, added, removed, snapshot, epoch)
            self._desk.computed(id, added)

    def _heard(self, instance: Instance, load: LoadReport) -> None:
        """A sign of life of the process; and of its engine, if it made a step or computed a prompt."""
        before, awake = instance.ledger.report, self._desk.awake.now
        instance.heard = awake
        if load.steps is None:
            instance.stepped = None
        elif before is None or (before.steps, before.queued_tokens) != (load.steps, load.queued_tokens):
            instance.stepped = awake

    # -- what others may ask ----------------------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        return self._desk.fleet

    def groups(self) -> Sequence[GroupView]:
        """The scaled groups and how many replicas each should have, as this gateway sees it."""
        return self._desk.groups.views()

    @property
    def waiting(self) -> int:
        return len(self._desk.queue.tickets)

    @property
    def awake_s(self) -> float:
        """Seconds that the loop was awake, as far as the ticks tell."""
        return self._desk.awake.now

    def estimate(self, facts: Facts) -> tuple[int, int]:
        """Tokens of prompt and of answer that the request is thought to need."""
        facts = replace(facts, slots=1) if not facts.slots else facts
        return tokens(facts, self._desk.estimate(facts))
