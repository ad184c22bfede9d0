"""What the router knows, and its two moves: to choose (which changes nothing) and to reserve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from infermesh.errors import Reason
from services.chassis.preemption import patience
from services.gateway.routing.admission import Bounds, Lane, Queue
from services.gateway.routing.affinity import PrefixIndex, cached_blocks, hint_keys, shared_blocks
from services.gateway.routing.choice import Choice, cached_tokens, choose, tokens
from services.gateway.routing.decision import Lease, Record
from services.gateway.routing.degrade import Pressure
from services.gateway.routing.ejections import Ejections
from services.gateway.routing.estimate import Estimate
from services.gateway.routing.facts import End, Facts, Outcome
from services.gateway.routing.fleet import Fleet, Instance
from services.gateway.routing.groups import Groups
from services.gateway.routing.ledger import US, Entry
from services.gateway.routing.line import Waiting, rank_of
from services.gateway.routing.policy import Policy, may_serve, resolve
from services.gateway.routing.pulse import Awake, Pulse
from services.gateway.routing.split import Split

SETTLE_S = 3.0  # how long a request waits for a directory that may still be filling
TELLING_TOKENS = 1024  # uncached prompts below this say nothing of an instance's prefill speed
TELLING_ANSWER = 8  # nor shorter answers of its decoding


class Desk:
    def __init__(self, now: float, bounds: Bounds, policy: Policy, salt: str = "") -> None:
        self.fleet = Fleet()
        self.bounds = bounds
        self.policy = policy
        self.queue = Queue(bounds)
        self.index = PrefixIndex()
        self.split = Split(policy.split)
        self.pressure = Pressure(policy.ttft_s)
        self.groups = Groups(policy.scale, policy.ttft_s, policy.tpot_ms / 1000, policy.law)
        self.born = now
        self.awake = Awake()
        self.looks = 0
        self.paced = 0.0  # awake: when `usual` was found
        self.usual: dict[Lane, float] = {}  # how far behind its predictions each model's middle instance is
        self.ejections = Ejections(salt)
        self.bans: dict[str, str] = {}  # instance -> who banned it and why
        self.young = False
        self.stale = True  # until somebody has told what there is
        self.ever: set[Lane] = set()
        self._seq = 0
        self._estimates: dict[tuple[str, str, str], Estimate] = {}

    # -- choosing ---------------------------------------------------------------------------------------------------

    def resolve(self, facts: Facts, draw: float) -> Facts:
        """Weighted aliases become one of their models."""
        variants = self.policy.aliases.get(facts.model)
        if variants is None:
            return facts
        return replace(
            facts, model=resolve(variants, facts, draw, lambda model: (facts.kind, model) in self.fleet.pools)
        )

    def may(self, facts: Facts, model: str) -> bool:
        """Whether the caller may be served by a model that he did not ask for."""
        if not facts.allowed:
            return True
        pool = self.fleet.pools.get((facts.kind, model), ())
        own = {alias for instance in pool for alias in instance.endpoint.aliases}
        return may_serve(facts.allowed, model, own, self.policy.aliases)

    def held(self, facts: Facts) -> dict[str, float]:
        """Instance -> the part of the prompt that is thought to be in its cache."""
        if not facts.chain and not facts.document_id and not facts.session_id:
            return {}
        return self.index.shares(facts.chain, facts.chain_share, _hints(facts))

    def choose(self, facts: Facts, held: Mapping[str, float], now: float, draw: float, granted: str = "") -> Choice:
        lane = (facts.kind, facts.model)
        pool = self.fleet.pools.get(lane)
        settling = self.young or now < self.born + SETTLE_S
        if pool is None:
            known = lane in self.ever
            reason = self.absent(lane)
            record = Record(facts.kind, facts.model, reason="settling" if settling else reason.value)
            said = "has no instance left" if known else "is not served by this mesh; GET /v1/models lists what is"
            if self.stale and not known:
                said = "is not known here, and the registry, which may know it, is out of reach"
            other = [kind for kind, name in self.fleet.pools if name == facts.model]
            if other:
                said = f"is of kind {other[0]}, which this method does not ask for"
            message = f"model {facts.model!r} {said}"
            refusal = None if settling and not other else reason
            return Choice(record, refusal=refusal, message=message, settling=settling)
        choice = choose(pool, facts, self.estimate(facts), held, now, draw, granted)
        if choice.refusal is Reason.NO_INSTANCE and settling and not facts.excluded:
            return Choice(choice.record, message=choice.message, settling=True)
        return choice

    def absent(self, lane: Lane) -> Reason:
        """Of a model without instances. One that nobody could tell us of is not one that does not exist."""
        return Reason.NO_INSTANCE if self.stale or lane in self.ever else Reason.MODEL_NOT_FOUND

    def estimate(self, facts: Facts) -> Estimate:
        """Of the model for this tenant; one that nobody serves is not remembered."""
        key = (facts.kind, facts.model, facts.tenant)
        found = self._estimates.get(key)
        if found is None:
            model = self._estimates.get((facts.kind, facts.model, ""))
            if model is None:
                model = Estimate()
                if (facts.kind, facts.model) in self.ever:
                    self._estimates[facts.kind, facts.model, ""] = model
            found = Estimate(model)
            if (facts.kind, facts.model) in self.ever:
                self._estimates[key] = found
        return found

    # -- reserving --------------------------------------------------------------------------------------------------

    def reserve(self, choice: Choice, facts: Facts, now: float, grant: int = 0) -> Lease:
        instance, record = choice.instance, choice.record
        assert instance is not None
        self._seq += 1
        entry = Entry(
            prompt=record.prompt_tokens - choice.cached,
            work=round(choice.work * US),
            output=record.output_tokens,
            slots=facts.slots,
            total=record.prompt_tokens,
            cached=choice.cached,
            thought=0.0 if choice.wait or choice.cached or instance.ledger.foreign_running else choice.work,
            step=choice.step,
            at=now,
            due=record.predicted_ttft_s,
            tenant=facts.tenant,
            rank=rank_of(facts),
        )
        if facts.kind == "llm" and facts.alike is None:
            slack = (facts.ttft_target_s or self.policy.ttft_s) - record.waited_s - record.predicted_ttft_s
            entry.patience = patience(entry.work, slack)
            entry.due += entry.patience / US
        pulse = entry.pulse = Pulse(self.awake.now, vital=instance.vital)
        instance.ledger.reserve(self._seq, entry, now)
        if facts.chain or facts.document_id or facts.session_id:
            self.index.insert(instance.id, (*facts.chain, *_hints(facts)))
            if facts.chain and self.queue.tickets:
                self._tell_waiting(instance.id, facts)
        if choice.long:
            tokens = record.prompt_tokens + record.output_tokens
            duration = choice.work + record.output_tokens * choice.step
            instance.reserve.observe(choice.work, tokens, duration, now)
        ledger = instance.ledger
        beside = max(1, ledger.own_slots + ledger.foreign_running)  # it decodes with these
        self.queue.turns.served(facts.tenant, choice.work + record.output_tokens * choice.step / beside)
        if self.policy.split and facts.kind == "llm":
            tokens = record.prompt_tokens + record.output_tokens
            pool = self.fleet.pools[facts.kind, facts.model]
            self.split.served(instance, tokens, pool, now)
        life = (instance.id, instance.endpoint.incarnation)
        kv_tokens = entry.prompt + entry.output
        return Lease(self._seq, *life, facts, record, pulse, entry.work, kv_tokens, grant, entry.patience, entry.rank)

    def _tell_waiting(self, id: str, sent: Facts) -> None:
        """Those who wait with the same beginning will find it on this instance."""
        for waiting in self.queue.relatives(sent):
            facts = waiting.facts
            share = min(1.0, shared_blocks(facts.chain, sent.chain) * facts.chain_share)
            self._finds(waiting, id, share)

    def computed(self, id: str, blocks: Iterable[int]) -> None:
        """The instance has these now, whichever gateway sent the prompt: those who wait for them will find them."""
        for waiting in self.queue.lack(blocks):
            self._finds(waiting, id, self.held(waiting.facts).get(id, 0.0))

    def _finds(self, waiting: Waiting, id: str, share: float) -> None:
        """So much of its prompt is on this instance. Where it waits for it, it is shorter work now."""
        if share > waiting.held.get(id, 0.0):
            waiting.held[id] = share
            if waiting.home == id:
                instance = self.fleet.instances[id]
                self.queue.lift(waiting)
                self.queue.place(waiting, instance, *self.work(instance, waiting.facts, waiting.held))

    def work(self, instance: Instance, facts: Facts, held: Mapping[str, float]) -> tuple[float, float]:
        """Seconds of the prompt there, with what is held now, and seconds that this saves."""
        prompt, _ = tokens(facts, self.estimate(facts))
        cached = cached_tokens(held.get(instance.id, 0.0), prompt)
        work = instance.rates.prefill(prompt - cached, cached)
        return work, instance.rates.prefill(prompt) - work if cached else 0.0

    # -- learning ---------------------------------------------------------------------------------------------------

    def learn(self, instance: Instance, lease: Lease, entry: Entry, outcome: Outcome, now: float) -> None:
        """From an attempt that is over."""
        facts, record = lease.facts, lease.record
        computed = entry.started_at > 0 or outcome.end is End.DONE
        if facts.chain:
            total = outcome.prompt_tokens or record.prompt_tokens
            expected = cached_blocks(record.cached_tokens, record.prompt_tokens, facts.chain_share)
            found = expected if outcome.cached_tokens is None else outcome.cached_tokens
            blocks = expected if outcome.cached_tokens is None else cached_blocks(found, total, facts.chain_share)
            self.index.learn(instance.id, facts.chain, expected, blocks, computed)
        if outcome.end is not End.DONE or not facts.slots or facts.alike is not None:
            return  # a continued answer is part of one: its counts are of the whole, its time is not
        estimate = self.estimate(facts)
        estimate.observe_prompt(facts.prompt_bytes, outcome.prompt_tokens)
        if facts.kind != "llm":
            return
        if outcome.completion_tokens:
            estimate.observe_output(outcome.completion_tokens // max(1, facts.choices))
        if not outcome.ttft_s or not entry.started_at:  # nobody measured
            return
        # Only what was alone says how fast the instance is: no prompt before it, none beside its answer.
        ledger = instance.ledger
        telling = entry.thought and not outcome.preempted
        if telling and record.prompt_tokens >= TELLING_TOKENS and not outcome.cached_tokens:
            instance.rates.observe_prefill(entry.started_at - entry.at - entry.step, entry.thought)
        alone = ledger.arrivals == entry.arrivals and not ledger.pending and not ledger.foreign_running
        if alone and outcome.completion_tokens >= TELLING_ANSWER and now > entry.started_at and facts.choices == 1:
            instance.rates.observe_step((now - entry.started_at) / (outcome.completion_tokens - 1), entry.step)


def _hints(facts: Facts) -> tuple[int, ...]:
    if not facts.document_id and not facts.session_id:
        return ()
    return hint_keys(facts.tenant, facts.document_id, facts.session_id)
