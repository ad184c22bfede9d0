"""The simulated mesh: arrivals, gateways, the wire and the engines, in virtual time. Same inputs and seed, same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from math import exp
from typing import Any

from infermesh.errors import Reason
from registry.endpoint import Endpoint
from services.gateway.routing.decision import Ask, Decision, Decline, Dispatch, Effect, Refuse, Wait
from services.gateway.routing.facts import End, Facts, Outcome
from services.gateway.simulator.door import Door
from services.gateway.simulator.encoder import EncoderEngine
from services.gateway.simulator.engine import BUDGET, LlmEngine
from services.gateway.simulator.fleet import Site, engine_of
from services.gateway.simulator.job import Job
from services.gateway.simulator.policy import Chance, Gateway, Policy
from services.gateway.simulator.trace import Request, Trace

HEARTBEAT_S = 1.0
IDLE_TICK_S = 0.25  # where nobody waits, time is told less often: it is what a run costs most
MAX_RANGE_REFUSALS = 3
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Conditions:
    """`network_s`: one way between gateway and instance. `estimate_error`: σ of the logarithm of bytes a token, which
    gateways estimate prompts from. `drain_s`: virtual seconds after the last arrival at which a run is cut."""

    gateways: int = 1
    network_s: float = 0.0005
    estimate_error: float = 0.05
    drain_s: float = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Run:
    """What happened: every request with its times, and each instance's seconds of work."""

    jobs: tuple[Job, ...]
    engines: tuple[LlmEngine | EncoderEngine, ...]
    end: float


_SENT, _ENGINE, _FIRST, _DONE, _REFUSED, _REPORT, _HEARD, _TICK, _ASKED, _GRANTED, _ROOM = range(11)


class World:
    def __init__(self, trace: Trace, site: Site, policy: Policy, conditions: Conditions, chance: Chance) -> None:
        self._policy = policy
        self._network_s = conditions.network_s
        self._chance = chance
        self._site = site
        self._block_tokens = trace.block_tokens
        self._asking = max(1, conditions.gateways) if policy.asks else 0
        self._endpoints: dict[str, Endpoint] = {}
        self._engines: dict[str, LlmEngine | EncoderEngine] = {}
        self._doors: dict[str, Door] = {}
        self._versions: dict[str, int] = {}
        self._every = 0.0  # seconds between two reports of an instance; 0 where nobody listens
        self._told: dict[str, tuple[int, float]] = {}
        self._timers: dict[str, int] = {}  # version of each instance's report timer
        self._logs: dict[str, list[tuple[bool, tuple[int, ...]]]] = {}
        for endpoint in site.endpoints:
            self._put(endpoint)
        self._idle_since = [0.0 for _ in range(max(1, conditions.gateways))]  # last tick that found nobody waiting
        self._gateways: list[Gateway] = [
            policy.gateway(site, trace.block_tokens, 0.0) for _ in range(max(1, conditions.gateways))
        ]
        self._tickets: list[dict[int, Job]] = [{} for _ in self._gateways]
        self._jobs = [
            Job(request, number % len(self._gateways), facts_of(request, trace, site, _noise(conditions, chance)))
            for number, request in enumerate(trace.requests)
        ]
        self._heap: list[tuple[float, int, int, Any]] = []
        self._count = 0
        self._open = len(self._jobs)
        self._horizon = (self._jobs[-1].request.arrival if self._jobs else 0.0) + conditions.drain_s

    def _put(self, endpoint: Endpoint) -> None:
        """An instance, idle and with an empty cache."""
        id = endpoint.id
        engine = engine_of(endpoint, self._block_tokens, self._site.budget.get(endpoint.group or id, BUDGET))
        self._endpoints[id], self._engines[id] = endpoint, engine
        self._doors[id] = Door(endpoint, engine, self._asking, self._policy.preempts)
        self._versions[id] = self._timers[id] = 0
        self._told[id] = (-1, -HEARTBEAT_S)
        if self._policy.cache_events != "never" and isinstance(engine, LlmEngine):
            engine.cache.log = self._logs[id] = []

    def run(self) -> Run:
        heap, now, next_job = self._heap, 0.0, 0
        self._start_timers()
        while self._open:
            arrival = self._jobs[next_job].request.arrival if next_job < len(self._jobs) else float("inf")
            if heap and heap[0][0] < arrival:
                now, _, what, about = heappop(heap)
                if now > self._horizon:
                    break
                self._happen(what, about, now)
            elif arrival < float("inf"):
                now = arrival
                self._pick(self._jobs[next_job], now)
                next_job += 1
            else:  # nothing will ever happen again: whoever is still waiting waits for ever
                break
        return Run(tuple(self._jobs), tuple(self._engines.values()), now)

    # -- time -------------------------------------------------------------------------------------------------------

    def _at(self, time: float, what: int, about: Any) -> None:
        self._count += 1
        heappush(self._heap, (time, self._count, what, about))

    def _start_timers(self) -> None:
        every = self._policy.report_s
        if every is not None:
            every = every or max(0.1, 0.0005 * len(self._engines))
            self._every = every
            for number, id in enumerate(self._engines):
                self._at(every * (number + 1) / len(self._engines), _REPORT, (id, 0))
        if self._policy.tick_s:
            for gateway in range(len(self._gateways)):
                self._at(self._policy.tick_s, _TICK, gateway)

    def _happen(self, what: int, about: Any, now: float) -> None:
        if what == _ENGINE:
            self._step(about[0], about[1], now)
        elif what == _FIRST:
            about.first = now
            if about.lease is not None:
                self._carry(self._gateways[about.gateway].started(about.lease, now), about.gateway, now)
        elif what == _DONE:
            self._done(about, now)
        elif what == _SENT:
            self._arrive(about, now)
        elif what == _REFUSED:
            job, reason, queued_s = about
            self._refused(job, reason, queued_s, now)
        elif what == _ASKED:
            gateway, said = about
            if isinstance(said, Ask):
                self._doors[said.instance_id].want(gateway, said.want, now)
            else:
                self._doors[said.instance_id].decline(gateway, said.ticket)
            self._grant(said.instance_id, now)
        elif what == _GRANTED:
            id, grant = about
            gateway = int(grant.gateway)
            self._carry(self._gateways[gateway].granted(self._endpoints[id], grant.ticket, now), gateway, now)
        elif what == _ROOM:
            if about[1] == self._doors[about[0]].versions:
                self._grant(about[0], now)
        elif what == _HEARD:
            id, loads, logged = about
            endpoint = self._endpoints[id]
            for number, gateway in enumerate(self._gateways):
                for stored, chain in logged:
                    self._carry(gateway.cache(endpoint, stored, chain, now), number, now)
                self._carry(gateway.report(endpoint, loads[number], now), number, now)
        elif what == _REPORT:
            self._report(about[0], about[1], now)
        elif what == _TICK:
            if self._tickets[about] or now - self._idle_since[about] >= IDLE_TICK_S:
                self._idle_since[about] = now
                self._carry(self._gateways[about].tick(now), about, now)
            self._at(now + self._policy.tick_s, _TICK, about)

    # -- the gateways' side -----------------------------------------------------------------------------------------

    def _pick(self, job: Job, now: float) -> None:
        decision = self._gateways[job.gateway].pick(job.facts, now, self._chance.random())
        self._follow(decision, job, now)
        self._ask(job.gateway, now)

    def _follow(self, decision: Decision, job: Job, now: float) -> None:
        if isinstance(decision, Dispatch):
            job.lease = decision.lease
            job.instance = decision.lease.instance_id
            job.degraded = bool(decision.lease.record.degraded_from)
            self._at(now + self._network_s, _SENT, job)
        elif isinstance(decision, Wait):
            self._tickets[job.gateway][decision.ticket] = job
        else:
            self._shed(job, decision.reason.value, now)

    def _carry(self, effects: Sequence[Effect], gateway: int, now: float) -> None:
        for effect in effects:
            if isinstance(effect, Dispatch | Refuse):
                job = self._tickets[gateway].pop(effect.ticket, None)
                if job is not None:
                    self._follow(effect, job, now)
            elif isinstance(effect, Decline):
                self._at(now + self._network_s, _ASKED, (gateway, effect))
        self._ask(gateway, now)

    def _ask(self, gateway: int, now: float) -> None:
        for ask in self._gateways[gateway].asks(now):
            self._at(now + self._network_s, _ASKED, (gateway, ask))

    def _shed(self, job: Job, why: str, now: float) -> None:
        job.shed, job.done = why, now
        self._open -= 1

    def _done(self, job: Job, now: float) -> None:
        job.done = now
        self._open -= 1
        assert job.lease is not None
        outcome = Outcome(
            End.DONE,
            prompt_tokens=job.request.prompt,
            completion_tokens=job.output,
            ttft_s=job.first - job.sent,
            duration_s=now - job.sent,
            cached_tokens=job.cached,
            preempted=int(job.moved),
        )
        self._carry(self._gateways[job.gateway].release(job.lease, outcome, now), job.gateway, now)

    def _refused(self, job: Job, reason: Reason, queued_s: float, now: float) -> None:
        """INSTANCE_FULL: released, and picked again with its age. OUT_OF_RANGE with the exact count: elsewhere."""
        assert job.lease is not None
        lease, job.lease = job.lease, None
        if reason is Reason.INSTANCE_FULL:
            full = Outcome(End.REFUSED, reason, queued_s=queued_s)
            self._carry(self._gateways[job.gateway].release(lease, full, now), job.gateway, now)
            self._pick(job, now)
            return
        job.refusals += 1
        outcome = Outcome(End.REFUSED, Reason.OUT_OF_RANGE, prompt_tokens=job.request.prompt)
        self._carry(self._gateways[job.gateway].release(lease, outcome, now), job.gateway, now)
        if job.refusals > MAX_RANGE_REFUSALS:
            self._shed(job, Reason.OUT_OF_RANGE.value, now)
            return
        job.facts = replace(
            job.facts,
            prompt_tokens=job.request.prompt,
            counted=True,
            excluded=job.facts.excluded | {lease.instance_id},
        )
        self._pick(job, now)

    # -- the instances' side ----------------------------------------------------------------------------------------

    def _arrive(self, job: Job, now: float) -> None:
        engine = self._engines[job.instance]
        refusal = self._doors[job.instance].refuses(job, now)
        if refusal is not None:
            self._at(now + self._network_s, _REFUSED, (job, *refusal))
            return
        job.sent = now - self._network_s
        asleep = engine.segment is None
        changed = engine.add(job, now)
        if self._doors[job.instance].order(now) or changed:
            self._schedule(job.instance)
        if asleep and self._every:  # its next report would be a heartbeat; it has something to tell now
            self._timers[job.instance] += 1
            due = max(now, self._told[job.instance][1] + self._every)
            self._at(due, _REPORT, (job.instance, self._timers[job.instance]))
        self._tell_cache(job.instance, now)

    def _schedule(self, id: str) -> None:
        """The engine's next event is another one than was scheduled."""
        self._versions[id] += 1
        segment = self._engines[id].segment
        if segment is not None:
            self._at(segment.end, _ENGINE, (id, self._versions[id]))

    def _step(self, id: str, version: int, now: float) -> None:
        if version != self._versions[id]:
            return
        started, done = self._engines[id].advance()
        for job in started:
            self._at(now + self._network_s, _FIRST, job)
        for job in done:
            self._at(now + self._network_s, _DONE, job)
        self._doors[id].moved(started, done, now)
        self._schedule(id)
        self._grant(id, now)
        self._tell_cache(id, now)

    def _grant(self, id: str, now: float) -> None:
        """Room goes to whoever asked best, and a timer to when time alone will have made some."""
        door = self._doors[id]
        for grant in door.grants(now):
            self._at(now + self._network_s, _GRANTED, (id, grant))
        if door.order(now):
            self._schedule(id)
        due = door.due(now)
        door.versions += 1
        if due is not None:
            self._at(due, _ROOM, (id, door.versions))

    def _tell_cache(self, id: str, now: float) -> None:
        log = self._logs.get(id)
        if not log or self._policy.cache_events != "at_once":
            return
        for number, gateway in enumerate(self._gateways):
            for stored, chain in log:
                self._carry(gateway.cache(self._endpoints[id], stored, chain, now), number, now)
        log.clear()

    def _report(self, id: str, version: int, now: float) -> None:
        """On change, and as a heartbeat."""
        if version != self._timers[id]:
            return
        engine = self._engines[id]
        changes, at = self._told[id]
        if engine.segment is not None or engine.changes != changes or now - at >= HEARTBEAT_S:
            self._told[id] = (engine.changes, now)
            loads = [self._doors[id].load(number, now) for number in range(len(self._gateways))]
            log = self._logs.get(id)
            logged: tuple[tuple[bool, tuple[int, ...]], ...] = ()
            if log and self._policy.cache_events == "with_report":
                logged = tuple(log)
                log.clear()
            self._at(now + self._network_s, _HEARD, (id, loads, logged))
        self._at(now + (self._every if engine.segment is not None else HEARTBEAT_S), _REPORT, (id, version))


def _noise(conditions: Conditions, chance: Chance) -> float:
    return exp(chance.gauss(0.0, conditions.estimate_error)) if conditions.estimate_error else 1.0


def facts_of(request: Request, trace: Trace, site: Site, noise: float) -> Facts:
    """What a gateway sees of a request: its bytes (`noise` times the usual number), not its tokens; never the length of
    its answer."""
    return Facts(
        kind=request.kind,
        model=request.model or site.models.get(request.kind, ""),
        prompt_bytes=max(1, round(request.prompt * BYTES_PER_TOKEN * noise)),
        max_tokens=request.max_tokens,
        tenant=request.tenant,
        klass=request.klass,
        priority=request.priority,
        session_id=request.session_id,
        document_id=request.document_id,
        chain=request.chain,
        chain_share=trace.block_tokens / request.prompt,
        since=request.arrival,
        degrade=request.degrade,
    )


def simulate(trace: Trace, site: Site, policy: Policy, conditions: Conditions, chance: Chance) -> Run:
    """One run. `chance` is used by this run alone."""
    return World(trace, site, policy, conditions, chance).run()
