"""The fleet as others tell of it: the directory, Links, drains, probes; and what that means for those who wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.gateway.routing import judge, panic, serving
from services.gateway.routing.decision import Close, Effect, Eject
from services.gateway.routing.desk import Desk
from services.gateway.routing.facts import Member
from services.gateway.routing.fleet import Instance
from services.gateway.routing.health import Cause, Standing, State
from services.gateway.routing.rates import rates


def update(desk: Desk, members: Iterable[Member], now: float, *, young: bool, stale: bool) -> list[Effect]:
    """The directory's whole content. Unchanged lives keep everything; a stale directory removes nobody."""
    desk.young, desk.stale = young, stale
    fleet = desk.fleet
    effects: list[Effect] = []
    listed: set[str] = set()
    for member in members:
        listed.add(member.endpoint.id)
        effects += _member(desk, member, now)
    if not stale:
        for instance in [i for i in fleet.instances.values() if i.id not in listed]:
            voices = instance.voices
            if voices.registered:
                voices.registered, voices.unregistered_at = False, now
    for instance in list(fleet.instances.values()):
        if instance.voices.over(now):
            effects += retire(desk, instance, "no longer registered", now)
    fleet.index()
    for instance in list(fleet.instances.values()):
        effects += judge.update(desk, instance, Cause.GONE, "the registry gave it up", now)
    desk.ever.update(fleet.pools)
    return effects + settle(desk, now)


def ban(desk: Desk, bans: Mapping[str, str], now: float) -> list[Effect]:
    """All that the operator has banned: they take no more work, and finish what they have."""
    desk.bans = dict(bans)
    effects: list[Effect] = []
    for instance in list(desk.fleet.instances.values()):
        instance.voices.banned = bans.get(instance.id, "")
        effects += refresh(desk, instance, Cause.BANNED, instance.voices.banned, now)
    return effects


def hear(
    desk: Desk, id: str, incarnation: int, why: str, now: float, cause: Cause = Cause.LOST, **said: object
) -> list[Effect]:
    """A voice about one life of an instance."""
    instance = desk.fleet.instances.get(id)
    if instance is None or instance.endpoint.incarnation != incarnation:
        return []
    for name, value in said.items():
        setattr(instance.voices, name, value)
    if instance.voices.over(now):
        return retire(desk, instance, why, now) + settle(desk, now)
    return refresh(desk, instance, cause, why, now)


def refresh(desk: Desk, instance: Instance, cause: Cause, why: str, now: float) -> list[Effect]:
    """Brings the state up to the voices, and gives the instance, or those who waited for it, what follows."""
    effects = judge.update(desk, instance, cause, why, now)
    return follow(desk, instance, effects, now)


def follow(desk: Desk, instance: Instance, effects: list[Effect], now: float) -> list[Effect]:
    """Work moves where an instance changed its state or has room."""
    if instance.state is not instance.settled:
        instance.settled = instance.state
        return effects + settle(desk, now)
    return effects + serving.serve(desk, instance, now)


def retire(desk: Desk, instance: Instance, why: str, now: float) -> list[Effect]:
    """Nobody vouches for it any more. Whoever stood in its line is unplaced."""
    if not instance.voices.draining:  # it did not leave of its own will
        desk.ejections.died(instance.id, instance.endpoint.incarnation, now)
    for waiting in instance.line.all():
        desk.queue.lift(waiting)
    del desk.fleet.instances[instance.id]
    desk.fleet.index()
    desk.index.forget(instance.id)
    life = (instance.id, instance.endpoint.incarnation)
    told = instance.state in (*judge.OUT, *panic.AWAY)
    cause = Cause.LEFT if instance.voices.draining else Cause.GONE
    effects: list[Effect] = [] if told else [Eject(instance.id, why, cause.value)]
    if instance.ledger.entries:
        desk.fleet.leaving[life] = instance
    else:
        effects.append(Close(*life))
    return effects


def settle(desk: Desk, now: float) -> list[Effect]:
    """The fleet changed: whoever stood in the line of one that takes no more is placed anew, and all lines move."""
    if not desk.queue.tickets:
        return []
    for instance in list(desk.queue.homes.values()):
        if instance.state not in (State.HEALTHY, State.PROBATION) and not instance.spare:
            for waiting in instance.line.all():
                desk.queue.lift(waiting)
    return serving.serve_all(desk, now)


def _member(desk: Desk, member: Member, now: float) -> list[Effect]:
    endpoint, fleet = member.endpoint, desk.fleet
    weight = desk.policy.weights.get(endpoint.id, 1.0)
    known = fleet.instances.get(endpoint.id)
    effects: list[Effect] = []
    if known is not None:
        before = known.endpoint
        if before.incarnation == endpoint.incarnation:
            known.voices.registered, known.voices.passing = True, member.passing
            if before != endpoint:
                learned = known.rates if before.speed == endpoint.speed else None
                known.endpoint, known.rates = endpoint, rates(endpoint, weight)
                if learned is not None:
                    known.rates.slowness, known.rates.step_slowness = learned.slowness, learned.step_slowness
                desk.index.track(endpoint.id, endpoint.capacity.kv_tokens)
            return []
        effects = retire(desk, known, "another life of it registered", now)
    if not member.passing:  # it never spoke to us, and the registry says it is not well
        return effects
    fresh = Instance(endpoint, rates(endpoint, weight), since=now)
    back = fleet.leaving.pop((endpoint.id, endpoint.incarnation), None)
    if back is not None:  # the same life returned while work of ours still runs there
        fresh.ledger = back.ledger
        fresh.ledger.forget_report()
    fresh.voices.banned = desk.bans.get(endpoint.id, "")
    desk.ejections.born(endpoint.id, endpoint.incarnation, now)
    until = desk.ejections.until(endpoint.id)
    if until > now:
        voices, times = fresh.voices, desk.ejections.count(endpoint.id)
        voices.standing, voices.cause, voices.until = Standing.OUT, Cause.DYING, until
        voices.why = f"it failed {times} times in a row"
        fresh.share = panic.EJECTED_SHARE
    fleet.instances[endpoint.id] = fresh
    if endpoint.kind == "llm":
        desk.index.track(endpoint.id, endpoint.capacity.kv_tokens)
    return effects
