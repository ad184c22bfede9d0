"""Want and grant: what this gateway tells instances that arbitrate between gateways, and what it does with their word.

Each request stands in one line only, so it is asked for in one place at a time. What is granted goes to whoever is best
there by then; where nobody is, the grant is declined at once, so that the room is not lost.
"""

from __future__ import annotations

from services.chassis.granting import FIRST_RANKS, US, Want
from services.gateway.routing.choice import cached_tokens, tokens
from services.gateway.routing.decision import Ask, Decline, Dispatch, Effect
from services.gateway.routing.desk import Desk
from services.gateway.routing.fleet import NOBODY, Instance
from services.gateway.routing.line import HASTE, TURN
from services.gateway.routing.serving import again

REPEAT_S = 1.0  # an ask is said again while it lasts: an instance may have lost it with a grant that went astray
SUMMARY_S = 0.02  # how late others may learn how long the line behind the first one is
UNKNOWN = NOBODY._replace(ticket=-1)  # what is said next is news, whatever it is
_HEAD = 9  # fields of a Want that say who is asked for


def asks(desk: Desk, now: float) -> list[Ask]:
    """What has changed for the instances whose lines were touched."""
    found: list[Ask] = []
    touched = desk.queue.touched
    for id in sorted(touched):
        instance = desk.fleet.instances.get(id)
        if instance is None or not instance.shared:
            touched.discard(id)
            continue
        want, told = want_of(desk, instance, now), instance.told
        if want[:_HEAD] == told[:_HEAD]:
            new = want.line_ms != told.line_ms
            if now - instance.told_at < (SUMMARY_S if new else REPEAT_S):
                if not new:
                    touched.discard(id)
                continue
            if not new and not want.ticket:
                touched.discard(id)
                continue
        touched.discard(id)
        instance.told, instance.told_at = want, now
        found.append(Ask(id, want))
    return found


def want_of(desk: Desk, instance: Instance, now: float) -> Want:
    """The request that the instance should take next of ours, and the line behind it."""
    line = instance.line
    if not line.count or instance.barred or now < instance.full_until:
        return NOBODY
    turn = instance.ledger.arrivals
    waiting = line.first(desk.queue.turns.ahead(), turn, instance.beyond(now))
    assert waiting is not None
    facts = waiting.facts
    prompt, output = tokens(facts, desk.estimate(facts))
    cached = cached_tokens(waiting.held.get(instance.id, 0.0), prompt)
    spare = 0
    capacity = instance.endpoint.capacity.kv_tokens
    if capacity and instance.endpoint.tier == "long-context" and not waiting.long:
        spare = instance.reserve.kv_tokens(now, capacity)
    rank, priority, _, _ = waiting.key
    if facts.alike is not None or (waiting.overdue and turn % TURN == 0):
        rank -= FIRST_RANKS
    ledger = instance.ledger
    decode = output * instance.rates.step(ledger.resident_tokens() + prompt)
    service = waiting.work + decode / (ledger.own_slots + ledger.foreign_running + 1)
    return Want(
        ticket=waiting.ticket,
        work_us=round(waiting.work * US),
        kv_tokens=prompt - cached + output,
        spare_tokens=spare,
        rank=rank,
        priority=-priority,
        bias_us=-round(HASTE * waiting.saved * US),
        late=waiting.late,
        tenant=facts.tenant,
        service_us=round(service * US),
        age_s=now - facts.since,
        line_ms=line.line_ms(),
        waiting=line.count,
    )


def granted(desk: Desk, instance: Instance, ticket: int, now: float) -> list[Effect]:
    """The instance has room for the first of our line. It has forgotten what it was asked, and waits to hear who is
    next. Nobody else takes the first one's place unasked: another gateway's may be better."""
    instance.told = UNKNOWN
    desk.queue.touched.add(instance.id)
    line, turns = instance.line, desk.queue.turns
    waiting = line.first(turns.ahead(), instance.ledger.arrivals, instance.beyond(now)) if line.count else None
    if waiting is None:
        return [Decline(instance.id, ticket)]
    desk.queue.lift(waiting)
    effects = again(desk, waiting, now, instance.id, ticket)
    if any(isinstance(effect, Dispatch) and effect.lease.instance_id == instance.id for effect in effects):
        return effects
    return [*effects, Decline(instance.id, ticket)]
