"""The router: decides, reserves in the same step, and says what else that set in motion.

No I/O, no clock, no chance: `now` (seconds, monotonic) and `draw` (0 <= draw < 1) are arguments, and whatever is to be
done for somebody else comes back as effects. Equal calls give equal answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from infermesh.errors import Reason
from services.gateway.routing.admission import Bounds, Queue, Waiting
from services.gateway.routing.choice import Choice, choose
from services.gateway.routing.cost import rates
from services.gateway.routing.decision import (
    Close,
    Decision,
    Dispatch,
    Effect,
    Eject,
    Lease,
    Probe,
    Record,
    Refuse,
    Wait,
)
from services.gateway.routing.estimate import Estimate
from services.gateway.routing.facts import End, Facts, LoadReport, Member, Outcome
from services.gateway.routing.fleet import Fleet, Instance
from services.gateway.routing.health import Doubt, Link, State

SETTLE_S = 3.0  # how long a request waits for a directory that may still be filling
FULL_PAUSE_S = 0.1  # an instance that refused for want of room is left alone so long, or until its next report
SCAN = 32  # waiting requests looked at in one step, at the head of a lane and behind it


class Router:
    def __init__(self, now: float, bounds: Bounds | None = None, weights: Mapping[str, float] | None = None) -> None:
        self.fleet = Fleet()
        self._bounds = bounds or Bounds()
        self._queue = Queue(self._bounds)
        self._weights = dict(weights or {})
        self._born = now
        self._young = False
        self._stale = True  # until somebody has told what there is
        self._seq = 0
        self._ticket = 0
        self._estimates: dict[tuple[str, str], Estimate] = {}
        self._ever: set[tuple[str, str]] = set()

    # -- requests ---------------------------------------------------------------------------------------------------

    def pick(self, facts: Facts, now: float, draw: float = 0.0) -> Decision:
        """Reserves an instance, or a place in the queue."""
        choice = self._choose(facts, now, draw)
        if choice.instance is not None:
            return Dispatch(self._reserve(choice.instance, facts, choice.record))
        if choice.refusal is not None:
            return Refuse(choice.refusal, choice.message, choice.record, self._retry_after(facts, choice.refusal))
        return self._enqueue(facts, choice, now, draw)

    def explain(self, facts: Facts, now: float, draw: float = 0.0) -> Record:
        """The record that `pick` would give, without reserving."""
        return self._choose(facts, now, draw).record

    def started(self, lease: Lease) -> None:
        """The first token is out: the prompt is computed."""
        instance = self.fleet.life(lease.instance_id, lease.incarnation)
        if instance is not None:
            instance.ledger.started(lease.seq)

    def release(self, lease: Lease, outcome: Outcome, now: float) -> list[Effect]:
        """Gives the reservation back. A second release of the same lease does nothing."""
        instance = self.fleet.life(lease.instance_id, lease.incarnation)
        if instance is None or not instance.ledger.release(lease.seq):
            return []
        effects: list[Effect] = []
        self._learn(lease.facts, outcome)
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
        return effects + self._refresh(instance, f"a call was lost: {outcome.reason}", now, serve=True)

    def cancel(self, ticket: int, now: float) -> list[Effect]:
        """The caller of a waiting request has gone. An unknown ticket is no error: its effect may be under way."""
        self._queue.remove(ticket)
        return []

    def tick(self, now: float) -> list[Effect]:
        """What time alone does: waits that end, pauses that are over, instances nobody vouches for. To be called every
        50 ms, and again at once while it has effects: one call ends at most `SCAN` waits."""
        effects: list[Effect] = []
        for waiting in self._queue.expired(now, SCAN):
            self._queue.remove(waiting.ticket)
            effects.append(self._expire(waiting, now))
        for instance in [i for i in self.fleet.instances.values() if i.voices.over(now)]:
            effects += self._retire(instance, "no longer registered")
        return effects + self._serve_all(now)

    # -- the fleet --------------------------------------------------------------------------------------------------

    def update(
        self, members: Iterable[Member], now: float, *, young: bool = False, stale: bool = False
    ) -> list[Effect]:
        """The directory's whole content. Unchanged lives keep everything; a stale directory removes nobody."""
        self._young, self._stale = young, stale
        effects: list[Effect] = []
        listed: set[str] = set()
        for member in members:
            listed.add(member.endpoint.id)
            effects += self._member(member)
        if not stale:
            for instance in [i for i in self.fleet.instances.values() if i.id not in listed]:
                voices = instance.voices
                if voices.registered:
                    voices.registered, voices.unregistered_at = False, now
        for instance in list(self.fleet.instances.values()):
            if instance.voices.over(now):
                effects += self._retire(instance, "no longer registered")
            else:
                effects += self._refresh(instance, "the registry gave it up", now)
        self.fleet.index()
        self._ever.update(self.fleet.pools)
        return effects + self._serve_all(now)

    def linked(self, id: str, incarnation: int, now: float) -> list[Effect]:
        """The Link to this life stands and its hello was right."""
        return self._hear(id, incarnation, "", now, link=Link.UP, doubt=Doubt.NONE)

    def unlinked(self, id: str, incarnation: int, why: str, now: float) -> list[Effect]:
        """The Link broke, or cannot be made."""
        instance = self.fleet.life(id, incarnation)
        if instance is not None:
            instance.ledger.forget_report()
        return self._hear(id, incarnation, why, now, link=Link.DOWN)

    def draining(self, id: str, incarnation: int, now: float) -> list[Effect]:
        """The instance takes no new work and finishes what it has."""
        return self._hear(id, incarnation, "draining", now, draining=True)

    def goodbye(self, id: str, incarnation: int, now: float) -> list[Effect]:
        """The instance left of its own will."""
        return self._hear(id, incarnation, "goodbye", now, link=Link.DOWN, registered=False)

    def probed(self, id: str, incarnation: int, well: bool, now: float) -> list[Effect]:
        """The answer to a Probe."""
        doubt = Doubt.NONE if well else Doubt.FAILED
        return self._hear(id, incarnation, "the probe failed", now, doubt=doubt)

    def report(self, id: str, incarnation: int, load: LoadReport, now: float) -> list[Effect]:
        """A load frame; room it shows goes to whoever waits. One that failed a probe is asked again: it lives."""
        instance = self.fleet.instances.get(id)
        if instance is None or instance.endpoint.incarnation != incarnation:
            return []
        instance.ledger.reconcile(load)
        instance.full_until = 0.0
        if instance.voices.doubt is Doubt.FAILED:
            return [Probe(id)]
        return self._serve(instance, now) if self._queue.tickets else []

    @property
    def waiting(self) -> int:
        return len(self._queue.tickets)

    def estimate(self, facts: Facts) -> tuple[int, int]:
        """Tokens of prompt and of answer that the request is thought to need."""
        estimate = self._estimate(facts)
        prompt = facts.prompt_tokens or estimate.prompt_tokens(facts.prompt_bytes)
        return prompt, estimate.output_tokens(facts.max_tokens, facts.choices) if facts.kind == "llm" else 0

    # -- inside -----------------------------------------------------------------------------------------------------

    def _choose(self, facts: Facts, now: float, draw: float) -> Choice:
        lane = (facts.kind, facts.model)
        pool = self.fleet.pools.get(lane)
        settling = self._young or now < self._born + SETTLE_S
        if pool is None:
            known = lane in self._ever
            reason = self._absent(lane)
            record = Record(facts.kind, facts.model, reason="settling" if settling else reason.value)
            said = "has no instance left" if known else "is not served by this mesh"
            if self._stale and not known:
                said = "is not known here, and the registry, which may know it, is out of reach"
            other = [kind for kind, name in self.fleet.pools if name == facts.model]
            if other:
                said = f"is of kind {other[0]}, which this method does not ask for"
            message = f"model {facts.model!r} {said}"
            return Choice(record, None, None if settling and not other else reason, message, settling)
        choice = choose(pool, facts, self._estimate(facts), now, draw)
        if choice.refusal is Reason.NO_INSTANCE and settling and not facts.excluded:
            return Choice(choice.record, None, None, choice.message, True)
        return choice

    def _absent(self, lane: tuple[str, str]) -> Reason:
        """Of a model without instances. One that nobody could tell us of is not one that does not exist."""
        return Reason.NO_INSTANCE if self._stale or lane in self._ever else Reason.MODEL_NOT_FOUND

    def _reserve(self, instance: Instance, facts: Facts, record: Record) -> Lease:
        self._seq += 1
        instance.ledger.reserve(self._seq, record.prompt_tokens, record.output_tokens, facts.slots)
        return Lease(self._seq, instance.id, instance.endpoint.incarnation, facts, record)

    def _enqueue(self, facts: Facts, choice: Choice, now: float, draw: float) -> Wait | Refuse:
        record = choice.record
        tokens = record.prompt_tokens + record.output_tokens
        bound = self._queue.full((facts.kind, facts.model), tokens)
        if bound:
            message = f"no room for {facts.model}: {bound}"
            return Refuse(Reason.QUEUE_FULL, message, record, self._retry_after(facts, Reason.QUEUE_FULL))
        until = self._until(facts, choice.settling, now)
        waiting = Waiting(self._ticket + 1, facts, tokens, until, draw)
        if until <= now:
            return self._expire(replace(waiting, ticket=0), now)
        self._ticket += 1
        self._queue.add(waiting)
        return Wait(waiting.ticket, record)

    def _until(self, facts: Facts, settling: bool, now: float) -> float:
        since = facts.since or now
        until = since + (SETTLE_S if settling else self._bounds.max_wait_s)
        return min(until, facts.deadline) if facts.deadline else until

    def _expire(self, waiting: Waiting, now: float) -> Refuse:
        facts, ticket = waiting.facts, waiting.ticket
        choice = self._choose(facts, now, waiting.draw)
        if facts.deadline and now >= facts.deadline:
            message = f"the deadline passed while the request waited for {facts.model}"
            return Refuse(Reason.DEADLINE_EXCEEDED, message, choice.record, None, ticket)
        if choice.refusal is not None or choice.settling:
            reason = choice.refusal or self._absent((facts.kind, facts.model))
            return Refuse(reason, choice.message, choice.record, self._retry_after(facts, reason), ticket)
        message = f"no room for {facts.model} within {self._bounds.max_wait_s:g} s"
        after = self._retry_after(facts, Reason.QUEUE_TIMEOUT)
        return Refuse(Reason.QUEUE_TIMEOUT, message, choice.record, after, ticket)

    def _retry_after(self, facts: Facts, reason: Reason) -> float | None:
        """Seconds until what waits now could be through."""
        if reason is Reason.NO_INSTANCE:
            return 1.0
        if reason not in (Reason.QUEUE_FULL, Reason.QUEUE_TIMEOUT):
            return None
        lane = (facts.kind, facts.model)
        speed = sum(instance.rates.output_tps for instance in self.fleet.pools.get(lane, ()))
        return min(max(self._queue.tokens.get(lane, 0) / speed, 0.5), 30.0) if speed else 1.0

    def _serve(self, instance: Instance, now: float) -> list[Effect]:
        endpoint = instance.endpoint
        effects: list[Effect] = []
        for name in (endpoint.model, *endpoint.aliases):
            effects += self._serve_lane((endpoint.kind, name), now)
        return effects

    def _serve_all(self, now: float) -> list[Effect]:
        return [effect for lane in list(self._queue.lanes) for effect in self._serve_lane(lane, now)]

    def _serve_lane(self, lane: tuple[str, str], now: float) -> list[Effect]:
        effects: list[Effect] = []
        for waiting in self._queue.look_at(lane, SCAN):
            choice = self._choose(waiting.facts, now, waiting.draw)
            if choice.instance is not None:
                self._queue.remove(waiting.ticket)
                lease = self._reserve(choice.instance, waiting.facts, choice.record)
                effects.append(Dispatch(lease, waiting.ticket))
            elif choice.refusal is not None:
                self._queue.remove(waiting.ticket)
                after = self._retry_after(waiting.facts, choice.refusal)
                effects.append(Refuse(choice.refusal, choice.message, choice.record, after, waiting.ticket))
            else:
                waiting.until = self._until(waiting.facts, choice.settling, now)
                if not any(i.has_room(waiting.facts.slots, now) for i in self.fleet.pools.get(lane, ())):
                    break
        return effects

    def _member(self, member: Member) -> list[Effect]:
        endpoint = member.endpoint
        known = self.fleet.instances.get(endpoint.id)
        effects: list[Effect] = []
        if known is not None:
            before = known.endpoint
            if before.incarnation == endpoint.incarnation:
                known.voices.registered, known.voices.passing = True, member.passing
                if before != endpoint:
                    known.endpoint, known.rates = endpoint, rates(endpoint, self._weights.get(endpoint.id, 1.0))
                return []
            effects = self._retire(known, "another life of it registered")
        if not member.passing:  # it never spoke to us, and the registry says it is not well
            return effects
        fresh = Instance(endpoint, rates(endpoint, self._weights.get(endpoint.id, 1.0)))
        back = self.fleet.leaving.pop((endpoint.id, endpoint.incarnation), None)
        if back is not None:  # the same life returned while work of ours still runs there
            fresh.ledger = back.ledger
            fresh.ledger.forget_report()
        self.fleet.instances[endpoint.id] = fresh
        return effects

    def _retire(self, instance: Instance, why: str) -> list[Effect]:
        del self.fleet.instances[instance.id]
        self.fleet.index()
        life = (instance.id, instance.endpoint.incarnation)
        told = instance.state in (State.LOST, State.DRAINING)
        effects: list[Effect] = [] if told else [Eject(instance.id, why)]
        if instance.ledger.entries:
            self.fleet.leaving[life] = instance
        else:
            effects.append(Close(*life))
        return effects

    def _hear(self, id: str, incarnation: int, why: str, now: float, **said: object) -> list[Effect]:
        instance = self.fleet.instances.get(id)
        if instance is None or instance.endpoint.incarnation != incarnation:
            return []
        for name, value in said.items():
            setattr(instance.voices, name, value)
        if instance.voices.over(now):
            return self._retire(instance, why) + self._serve(instance, now)
        return self._refresh(instance, why, now, serve=True)

    def _refresh(self, instance: Instance, why: str, now: float, *, serve: bool = False) -> list[Effect]:
        """Brings the state up to the voices."""
        state = instance.voices.state()
        effects: list[Effect] = []
        if state is not instance.state:
            if state in (State.LOST, State.DRAINING):
                effects.append(Eject(instance.id, why))
            instance.state = state
        if serve and self._queue.tickets:
            effects += self._serve(instance, now)
        return effects

    def _learn(self, facts: Facts, outcome: Outcome) -> None:
        if outcome.end is not End.DONE or not facts.slots:
            return
        estimate = self._estimate(facts)
        estimate.observe_prompt(facts.prompt_bytes, outcome.prompt_tokens)
        if facts.kind == "llm" and outcome.completion_tokens:
            estimate.observe_output(outcome.completion_tokens // max(1, facts.choices))

    def _estimate(self, facts: Facts) -> Estimate:
        """Of the model; one that nobody serves is not remembered."""
        lane = (facts.kind, facts.model)
        found = self._estimates.get(lane)
        if found is None:
            found = Estimate()
            if lane in self._ever:
                self._estimates[lane] = found
        return found
