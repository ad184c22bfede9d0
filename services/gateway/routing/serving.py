"""Who waits, who goes next, and who is given up.

An instance keeps a short line of prompts of its own; beyond that, requests wait here, where the choice stays open. When
an instance can take somebody, it takes the first of its line, if that is still the best place for it; when its line is
empty, it relieves another one whose line would take longer.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from infermesh.errors import Reason
from services.gateway.routing.choice import Choice, cached_tokens, tokens
from services.gateway.routing.decision import Decision, Dispatch, Effect, Record, Refuse, Wait
from services.gateway.routing.desk import SETTLE_S, Desk
from services.gateway.routing.facts import Facts
from services.gateway.routing.fleet import Instance
from services.gateway.routing.ledger import US
from services.gateway.routing.line import Waiting, rank_of

SCAN = 32  # waits that end in one step
TRIES = 8  # requests that are looked at again at one event
BLOCKED_S = 1.0  # what a line without slots or KV room waits at least; the choice itself knows better
YIELDS = 8  # who wait and are looked at in one step, whether their fallback would serve them sooner
RELIEF = 4  # of each other line, when an instance has none of its own


def pick(desk: Desk, facts: Facts, now: float, draw: float) -> Decision:
    facts = desk.resolve(facts, draw)
    held = desk.held(facts)
    choice = desk.choose(facts, _expected(desk, facts, held, 0), now, draw)
    if choice.instance is not None:
        facts, held, choice = degraded(desk, facts, held, choice, now, draw)
    if choice.refusal is not None:
        return Refuse(choice.refusal, choice.message, choice.record, retry_after(desk, facts, choice.refusal))
    instance = choice.instance
    if instance is not None and choice.ready:
        line = instance.line if instance.line.count and facts.slots and not choice.asks else None
        if line is None or _goes_first(desk, instance, facts, choice.work, now):
            return Dispatch(desk.reserve(choice, facts, now))
    return _enqueue(desk, facts, held, choice, now, draw)


def _goes_first(desk: Desk, instance: Instance, facts: Facts, work: float, now: float) -> bool:
    """Whether a newcomer would be taken before those who wait there."""
    turns = desk.queue.turns
    beyond = instance.beyond(now)
    first = instance.line.first(turns.ahead(), instance.ledger.arrivals, beyond)
    assert first is not None
    newcomer = Waiting(0, facts, 0, 0.0, 0.0, {}, work=work)
    if first.facts.tenant == facts.tenant:
        return newcomer.order(work, 0.0) < first.key
    ours, theirs = facts.tenant, first.facts.tenant
    return newcomer.between(turns.ahead_of(ours), ours in beyond) < first.between(
        turns.ahead_of(theirs), theirs in beyond
    )


def degraded(
    desk: Desk, facts: Facts, held: dict[str, float], choice: Choice, now: float, draw: float
) -> tuple[Facts, dict[str, float], Choice]:
    """The request as its model's fallback would serve it, where it may and should; else as it is."""
    other = desk.policy.fallbacks.get(facts.model)
    if other is None or not desk.may(facts, other) or not desk.pressure.yields(facts, choice.pressure, now):
        return facts, held, choice
    instead = replace(facts, model=other)
    held_there = desk.held(instead)
    there = desk.choose(instead, held_there, now, draw)
    if there.instance is None or there.pressure + there.work >= choice.pressure + choice.work:
        return facts, held, choice
    return instead, held_there, replace(there, record=replace(there.record, degraded_from=facts.model))


def serve(desk: Desk, instance: Instance, now: float) -> list[Effect]:
    """Gives the instance work, as long as it could begin it soon."""
    effects: list[Effect] = []
    if not desk.queue.tickets:
        return effects
    content: set[str] = set()  # tenants that have all the room here that they may have
    for _ in range(TRIES):
        line, turns, ledger = instance.line, desk.queue.turns, instance.ledger
        starts = could_start(instance, now)
        if not starts and not (ledger.preempts and ledger.pending and line.count):
            break
        if line.count:
            waiting = line.first(turns.ahead(), ledger.arrivals, instance.beyond(now), content)
            if not starts and (waiting is None or not could_start(instance, now, waiting)):
                break
        else:
            waiting = _relief(desk, instance, now, content)
        if waiting is None:
            break
        if not instance.has_slot(now, waiting.facts.tenant):
            content.add(waiting.facts.tenant)
            continue
        home = waiting.home
        desk.queue.lift(waiting)
        placed = again(desk, waiting, now)
        if placed:
            effects += placed
        elif waiting.home == home:
            break  # it stays where it stood
    return effects


def yield_waiting(desk: Desk, now: float) -> list[Effect]:
    """Pressure may have come after they did: some of those who wait go where newcomers like them go now."""
    effects: list[Effect] = []
    queue, pressure = desk.queue, desk.pressure
    found = [w for w in queue.tickets.values() if not w.degraded_from and pressure.yielding(w.facts)]
    found.sort(key=Waiting.yields_after)
    for waiting in found[:YIELDS]:
        home, work, saved = queue.homes.get(waiting.home), waiting.work, waiting.saved
        queue.lift(waiting)
        choice = desk.choose(waiting.facts, waiting.held, now, waiting.draw)
        if choice.instance is None:
            continue  # unplaced now: chosen for anew at the next tick
        facts, held, choice = degraded(desk, waiting.facts, waiting.held, choice, now, waiting.draw)
        waiting.looked += 1
        if facts is waiting.facts:
            queue.place(waiting, home, work, saved)
            continue
        queue.remove(waiting.ticket)
        waiting.degraded_from, waiting.facts, waiting.held = waiting.facts.model, facts, held
        if choice.ready:
            effects.append(Dispatch(desk.reserve(choice, facts, now), waiting.ticket))
        else:
            queue.add(waiting)
            _place(desk, waiting, choice)
    return effects


def serve_all(desk: Desk, now: float) -> list[Effect]:
    """What time alone makes possible."""
    effects: list[Effect] = []
    if desk.policy.split:
        for pool in desk.fleet.pools.values():
            desk.split.settle(pool, now)
    if not desk.queue.tickets:
        return effects
    for waiting in list(desk.queue.unplaced.values()):
        effects += again(desk, waiting, now)
    desk.queue.age(now, desk.policy.ttft_s)
    if desk.policy.fallbacks:
        effects += yield_waiting(desk, now)
    lanes = list(desk.queue.requests)
    seen: set[str] = set()
    for lane in lanes:
        for instance in desk.fleet.pools.get(lane, ()):
            if instance.id not in seen:
                seen.add(instance.id)
                effects += serve(desk, instance, now)
    return effects


def again(desk: Desk, waiting: Waiting, now: float, granted: str = "", ticket: int = 0) -> list[Effect]:
    """Chooses anew for an unplaced request: it goes, is refused, or stands in a line. `granted`: the instance that has
    room for it, under that ticket."""
    facts, queue = waiting.facts, desk.queue
    if waiting.held:
        waiting.held = desk.held(facts)
    choice = desk.choose(facts, _expected(desk, facts, waiting.held, waiting.ticket), now, waiting.draw, granted)
    if choice.instance is not None and choice.ready and choice.cached and not waiting.held.get(choice.instance.id):
        choice = desk.choose(facts, waiting.held, now, waiting.draw, granted)  # a promise that nobody has kept yet
    if choice.instance is not None and choice.ready:
        queue.remove(waiting.ticket)
        record = choice.record
        if waiting.degraded_from:
            record = replace(record, degraded_from=waiting.degraded_from)
            choice = replace(choice, record=record)
        grant = ticket if choice.record.chosen == granted else 0
        return [Dispatch(desk.reserve(choice, facts, now, grant), waiting.ticket)]
    if choice.refusal is not None:
        queue.remove(waiting.ticket)
        after = retry_after(desk, facts, choice.refusal)
        return [Refuse(choice.refusal, choice.message, choice.record, after, waiting.ticket)]
    waiting.until = _until(desk, facts, choice.settling, now)
    _place(desk, waiting, choice)
    return []


def _place(desk: Desk, waiting: Waiting, choice: Choice) -> None:
    """Into the line of the instance it would go to, by the work that it is there as things are."""
    instance = choice.instance
    waiting.long = choice.long
    work, saved = desk.work(instance, waiting.facts, waiting.held) if instance is not None else (0.0, 0.0)
    desk.queue.place(waiting, instance, work, saved)


def _expected(desk: Desk, facts: Facts, held: dict[str, float], ticket: int) -> dict[str, float]:
    """What instances hold, and what those who wait for them will have left there: relatives go to one place."""
    promised = desk.queue.promised(facts, ticket)
    if not promised:
        return held
    return {**held, **{id: share for id, share in promised.items() if share > held.get(id, 0.0)}}


def expire(desk: Desk, now: float) -> list[Effect]:
    """Ends waits, at most `SCAN` of them."""
    effects: list[Effect] = []
    for waiting in desk.queue.expired(now, SCAN):
        desk.queue.remove(waiting.ticket)
        effects.append(_given_up(desk, waiting, now))
    return effects


def could_start(instance: Instance, now: float, waiting: Waiting | None = None) -> bool:
    """Has a slot, and no more prompts queued than an instance should have; of those that `waiting` does not
    overtake."""
    ledger = instance.ledger
    behind = ledger.overtaken(round(waiting.work * US), rank_of(waiting.facts), now) if waiting is not None else ()
    return instance.has_slot(now) and instance.is_open(ledger.wait_s(now, behind), instance.crowd(), now)


def retry_after(desk: Desk, facts: Facts, reason: Reason) -> float | None:
    """Seconds until what waits now could be through."""
    if reason is Reason.NO_INSTANCE:
        return 1.0
    if reason not in (Reason.QUEUE_FULL, Reason.QUEUE_TIMEOUT):
        return None
    pool = desk.fleet.pools.get((facts.kind, facts.model), ())
    if not pool:
        return 1.0
    return min(max(sum(instance.busy_s() for instance in pool) / len(pool), 0.5), 30.0)


def _relief(desk: Desk, instance: Instance, now: float, but: Container[str]) -> Waiting | None:
    """Of those who wait for other instances, the one who gains most by coming here; of none of the tenants `but`."""
    endpoint, rates = instance.endpoint, instance.rates
    names = {endpoint.model, *endpoint.aliases}
    best: Waiting | None = None
    most = 0.0
    for other in desk.queue.homes.values():
        wait = other.ledger.wait_s(now)
        if wait <= other.rates.depth_s:  # prompts do not hold them up: slots or KV room do
            wait += BLOCKED_S
        for waiting in other.line.last(RELIEF):
            facts = waiting.facts
            if facts.model not in names or facts.kind != endpoint.kind or instance.id in facts.excluded:
                continue
            if facts.tenant in but:
                continue
            prompt, _ = tokens(facts, desk.estimate(facts))
            cached = cached_tokens(waiting.held.get(instance.id, 0.0), prompt)
            gain = wait + other.line.ahead_s(waiting.work) - rates.prefill(prompt - cached, cached)
            if gain > most:
                best, most = waiting, gain
    return best


def _enqueue(
    desk: Desk, facts: Facts, held: dict[str, float], choice: Choice, now: float, draw: float
) -> Wait | Refuse:
    record = choice.record
    size = record.prompt_tokens + record.output_tokens
    bound = desk.queue.full((facts.kind, facts.model), size, facts.tenant)
    if bound:
        message = f"no room for {facts.model}: {bound}"
        return Refuse(Reason.QUEUE_FULL, message, record, retry_after(desk, facts, Reason.QUEUE_FULL))
    if not facts.since:
        facts = replace(facts, since=now)
    until = _until(desk, facts, choice.settling, now)
    waiting = Waiting(0, facts, size, until, draw, held, degraded_from=record.degraded_from)
    if until <= now:
        return _given_up(desk, waiting, now)
    waiting.ticket = desk.queue.next_ticket()
    desk.queue.add(waiting)
    _place(desk, waiting, choice)
    return Wait(waiting.ticket, record)


def _until(desk: Desk, facts: Facts, settling: bool, now: float) -> float:
    until = (facts.since or now) + (SETTLE_S if settling else desk.bounds.max_wait_s)
    return min(until, facts.deadline) if facts.deadline else until


def _given_up(desk: Desk, waiting: Waiting, now: float) -> Refuse:
    facts, ticket = waiting.facts, waiting.ticket
    choice = desk.choose(facts, waiting.held, now, waiting.draw)
    record: Record = choice.record
    if facts.deadline and now >= facts.deadline:
        message = f"the deadline passed while the request waited for {facts.model}"
        return Refuse(Reason.DEADLINE_EXCEEDED, message, record, None, ticket)
    if choice.refusal is not None or choice.settling:
        reason = choice.refusal or desk.absent((facts.kind, facts.model))
        return Refuse(reason, choice.message, record, retry_after(desk, facts, reason), ticket)
    message = f"no room for {facts.model} within {desk.bounds.max_wait_s:g} s"
    return Refuse(Reason.QUEUE_TIMEOUT, message, record, retry_after(desk, facts, Reason.QUEUE_TIMEOUT), ticket)
