"""What the signals about an instance lead to: it is doubted, taken out, let back in; and its calls are moved."""

from __future__ import annotations

from services.gateway.routing import panic
from services.gateway.routing.decision import Abandon, Effect, Eject, Lease, Probe
from services.gateway.routing.desk import Desk
from services.gateway.routing.ejections import RAMP_FROM, RAMP_S
from services.gateway.routing.facts import End, Outcome
from services.gateway.routing.fleet import Instance
from services.gateway.routing.health import PASSES, Cause, Link, Signal, Standing, State
from services.gateway.routing.ledger import Entry
from services.gateway.routing.pace import Pace
from services.gateway.routing.tally import Tally

SILENT_S = 1.0  # a call of an instance that is out, so long without a sign of life, is moved
OUT = (State.LOST, State.EJECTED)


def update(desk: Desk, instance: Instance, cause: Cause, why: str, now: float) -> list[Effect]:
    """Brings the state up to what is said and thought of the instance."""
    before, state = instance.state, instance.voices.state()
    if state is before:
        return []
    instance.state, instance.since = state, now
    if state is State.LOST:
        instance.voices.why = why
    if state is State.HEALTHY and before is State.STARTING and _is_newcomer(desk, instance, now):
        slow_start(instance, now)
    panic.settle(desk.fleet, instance)
    effects: list[Effect] = []
    if state in (*OUT, *panic.AWAY) and before not in OUT:
        effects.append(Eject(instance.id, why, cause.value))
    return effects + move_calls(desk, instance) if state in OUT else effects


def slow_start(instance: Instance, now: float) -> None:
    """Its cache is cold, or nobody knows how it does: its share of the work grows over half a minute."""
    instance.ramp_from, instance.share = now, RAMP_FROM


def _is_newcomer(desk: Desk, instance: Instance, now: float) -> bool:
    """Among others that have served for a while, or after a life that ended badly; where all are new, all are equal."""
    others = [
        other
        for pool in desk.fleet.pools_of(instance)
        for other in pool
        if other is not instance and other.state is State.HEALTHY
    ]
    if desk.ejections.count(instance.id):
        return bool(others)
    return any(now - other.since >= RAMP_S for other in others)


def doubt(desk: Desk, instance: Instance, cause: Cause, why: str, now: float) -> list[Effect]:
    """Something is odd: it takes no more work for now, and is asked."""
    voices = instance.voices
    if voices.standing is Standing.TRIAL:
        return convict(desk, instance, cause, why, now)
    if not voices.signal(Signal.DOUBT):
        return []
    voices.cause, voices.why = cause, why
    instance.asked = desk.awake.now
    return [*update(desk, instance, cause, why, now), Probe(instance.id)]


def convict(desk: Desk, instance: Instance, cause: Cause, why: str, now: float, *, sure: bool = False) -> list[Effect]:
    """It is taken out, if its pool can spare it; else it stays suspect. `sure`: it is of no use to any pool."""
    voices = instance.voices
    if voices.standing is Standing.OUT:
        return []
    if not sure and not panic.may_eject(desk.fleet, instance):
        if voices.standing is Standing.TRIAL:
            voices.standing = Standing.SOUND
        effects = doubt(desk, instance, cause, why, now)
        voices.cause, voices.why = cause, why
        return effects
    voices.signal(Signal.CONVICTED)
    voices.cause, voices.why = cause, why
    voices.until = desk.ejections.strike(instance.id, now, free=cause.evident)
    instance.asked = desk.awake.now
    instance.tally, instance.pace = Tally(), Pace()  # it was not slow, it was out
    instance.ramp_from, instance.share = None, panic.EJECTED_SHARE
    return update(desk, instance, cause, why, now)


def cleared(desk: Desk, instance: Instance, now: float) -> list[Effect]:
    """What was odd is over. One that was out comes back slowly."""
    voices = instance.voices
    was_out, cause = voices.standing is Standing.OUT, voices.cause or Cause.SILENT
    if not voices.signal(Signal.CLEARED):
        return []
    if was_out:
        slow_start(instance, now)
    return update(desk, instance, cause, "", now)


def probed(desk: Desk, instance: Instance, well: bool, now: float) -> list[Effect]:
    """The answer to a probe. It speaks of the process, not of its engine: what does not move is not cleared by it."""
    voices = instance.voices
    instance.asked = desk.awake.now
    voices.mute = not well
    if not well:
        voices.passes = 0
        if voices.standing is Standing.OUT:
            return []
        return convict(desk, instance, Cause.SILENT, "the probe failed", now)
    instance.heard = desk.awake.now
    if voices.standing is Standing.DOUBTED and voices.cause not in (Cause.NO_PROGRESS, Cause.FAILURES):
        return cleared(desk, instance, now)
    if voices.standing is not Standing.OUT:
        return []
    voices.passes += 1
    if voices.passes < PASSES or now < voices.until:
        return []
    if voices.cause is not None and voices.cause.evident:
        return cleared(desk, instance, now)
    voices.signal(Signal.ADMITTED)
    instance.share = 1.0
    return update(desk, instance, Cause.FAILURES, "", now)


def ended(desk: Desk, instance: Instance, lease: Lease, entry: Entry, outcome: Outcome, now: float) -> list[Effect]:
    """A call ended. The caller's own errors and endings say nothing of the instance."""
    voices = instance.voices
    if outcome.end is End.DONE:
        instance.tally.succeeded(now)
        instance.vital.at = desk.awake.now
        if voices.signal(Signal.PROVEN):
            slow_start(instance, now)
            return update(desk, instance, Cause.FAILURES, "", now)
        if voices.standing is Standing.DOUBTED and voices.cause is Cause.FAILURES:
            return cleared(desk, instance, now)
        return []
    if outcome.end is End.MISTAKEN:
        why = "it answers as another instance, or with another model"
        return convict(desk, instance, Cause.IDENTITY, why, now, sure=True)
    if outcome.end not in (End.FAILED, End.LOST) or voices.link is Link.DOWN:
        return []
    instance.tally.failed(entry.at, now)
    what = f"a call was lost: {outcome.reason}" if outcome.end is End.LOST else f"a call failed: {outcome.reason}"
    if voices.standing is Standing.TRIAL:
        return convict(desk, instance, Cause.FAILURES, what, now)
    many = instance.tally.too_many(now, _others(desk, instance, now))
    if many:
        return convict(desk, instance, Cause.FAILURES, many, now)
    if outcome.end is End.LOST and not entry.abandoned:
        return doubt(desk, instance, Cause.LOST, what, now)
    return []


def move_calls(desk: Desk, instance: Instance, why: str = "") -> list[Effect]:
    """Cuts the calls of an instance that is out, as far as nothing moves on them and others could take them."""
    entries = instance.ledger.entries
    if not entries or not panic.elsewhere(desk.fleet, instance):
        return []
    awake = desk.awake.now
    why = why or f"{instance.id} is {instance.state.value}: {instance.voices.why}"
    return [
        abandon(seq, entry, why)
        for seq, entry in entries.items()
        if entry.pulse.heeded and not entry.abandoned and awake - entry.pulse.at >= SILENT_S
    ]


def abandon(seq: int, entry: Entry, why: str) -> Effect:
    entry.abandoned = True
    return Abandon(seq, why)


def _others(desk: Desk, instance: Instance, now: float) -> tuple[int, int]:
    """Failed and all calls of the rest of its pool."""
    failed = total = 0
    for pool in desk.fleet.pools_of(instance)[:1]:
        for other in pool:
            if other is not instance:
                bad, all = other.tally.window(now)
                failed, total = failed + bad, total + all
    return failed, total
