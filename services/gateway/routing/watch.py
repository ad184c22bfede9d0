"""Watchdogs: silence of an instance's Link, an engine that makes no progress, single streams that stall.

All silence is seconds awake (pulse.py). What stands still has to be told from what takes its time: an engine whose
steps advance computes, and a prompt may take as long as predicted, times four.
"""

from __future__ import annotations

from services.gateway.routing import judge, panic
from services.gateway.routing.decision import Effect, Probe
from services.gateway.routing.desk import Desk
from services.gateway.routing.ejections import FIRST_S, ramp
from services.gateway.routing.fleet import Instance
from services.gateway.routing.health import Cause, Link, Standing
from services.gateway.routing.ledger import US
from services.gateway.routing.pace import EVERY_S, usual

PARTS = 4  # of the fleet, one a tick: everybody is looked at five times a second
TURNS = 5  # of those, one goes through all its streams
QUIET_S = 1.5  # frames come at least every second
ASK_S = 0.5  # between two probes of an instance that is out
STILL_S = 2.0  # no token of any stream, no step
GAPS = 10.0  # or so many times the 99th percentile between two tokens
SUSPECT_PART = 0.75  # of that bound
PROMPT_FACTOR = 4.0  # a prompt may take so many times its prediction
UNTOLD_FACTOR = 5.0  # and so many times that, where the speed is a guess
UNTOLD_S = 30.0
CHUNK = 8192  # tokens of others' prompts that one step may compute
STALL_S = 3.0
STEPPING_S = 120.0
CROWDED_S = 10.0  # a stream may have been preempted where requests wait
ENCODE_S = 5.0


def look(desk: Desk, now: float) -> list[Effect]:
    """To be called at every tick: each looks at one part of the fleet, so that none of them holds the loop."""
    desk.looks += 1
    part = desk.looks % PARTS
    if not part:
        desk.ejections.forgive(now)
    effects: list[Effect] = []
    awake = desk.awake.now
    if awake - desk.paced >= EVERY_S:
        desk.paced = awake
        desk.usual = {lane: usual([instance.pace for instance in pool]) for lane, pool in desk.fleet.pools.items()}
    turn = desk.looks // PARTS % TURNS
    for number, instance in enumerate(list(desk.fleet.instances.values())[part::PARTS]):
        if instance.ramp_from is not None:
            _ramp(instance, now)
        closely = number % TURNS == turn
        if closely and instance.state not in judge.OUT:
            _pace(desk, instance)
        effects += _look(desk, instance, now, closely)
    for instance in list(desk.fleet.leaving.values())[part::PARTS]:
        effects += judge.move_calls(desk, instance, f"{instance.id} has left")
    return effects


def _look(desk: Desk, instance: Instance, now: float, closely: bool) -> list[Effect]:
    voices, awake = instance.voices, desk.awake.now
    if instance.state in judge.OUT:
        effects = judge.move_calls(desk, instance)
        if voices.link is Link.UP and now >= voices.until and awake - instance.asked >= ASK_S:
            instance.asked = awake
            effects.append(Probe(instance.id))
        return effects
    quiet = awake - instance.heard if instance.beats and voices.link is Link.UP else 0.0
    if quiet > QUIET_S and voices.standing is Standing.SOUND:
        return judge.doubt(desk, instance, Cause.SILENT, f"no frame for {quiet:.1f} s", now)
    if voices.standing is Standing.DOUBTED and voices.link is Link.UP and awake - instance.asked >= ASK_S:
        if voices.cause is Cause.FAILURES and now - instance.since >= FIRST_S:  # its pool could not spare it
            return judge.cleared(desk, instance, now)
        instance.asked = awake
        return [Probe(instance.id), *_progress(desk, instance, now)]
    if not instance.ledger.entries:
        if voices.standing is Standing.DOUBTED and voices.cause is Cause.NO_PROGRESS:
            return judge.cleared(desk, instance, now)
        return []
    return _progress(desk, instance, now) or (_stalls(desk, instance) if closely else [])


def _progress(desk: Desk, instance: Instance, now: float) -> list[Effect]:
    voices, awake = instance.voices, desk.awake.now
    doubted = voices.standing is Standing.DOUBTED and voices.cause is Cause.NO_PROGRESS
    if awake - instance.vital.at < SUSPECT_PART * STILL_S and not doubted:
        return []
    silent = stillness(instance, awake)
    bound = patience(instance)
    if silent < SUSPECT_PART * bound:
        return judge.cleared(desk, instance, now) if doubted else []
    why = f"work is in flight, and nothing has moved for {silent:.1f} s"
    mute = instance.beats and awake - instance.heard > QUIET_S  # the whole process: its return will be plain
    cause = Cause.SILENT if mute else Cause.NO_PROGRESS
    if silent >= bound:
        if instance.state in panic.AWAY:
            return judge.move_calls(desk, instance, f"{instance.id}: {why}")
        return judge.convict(desk, instance, cause, why, now)
    return judge.doubt(desk, instance, cause, why, now)


def stillness(instance: Instance, awake: float) -> float:
    """Seconds awake since anything moved while somebody waited for it."""
    oldest = min((e.pulse.at for e in instance.ledger.entries.values() if e.pulse.heeded and e.slots), default=awake)
    moved = max(instance.vital.at, oldest)
    if instance.stepped is not None:
        moved = max(moved, instance.stepped)
    return awake - moved


def patience(instance: Instance) -> float:
    """Seconds that everything may stand still: one step between two tokens, or the longest prompt in one piece."""
    ledger, rates = instance.ledger, instance.rates
    factor = PROMPT_FACTOR * (1 if rates.told else UNTOLD_FACTOR)
    if instance.endpoint.kind != "llm":
        return ENCODE_S + factor * (ledger.own_work + ledger.foreign_work) / US + (0 if rates.told else UNTOLD_S)
    waiting = (entry.whole for entry in ledger.entries.values() if not entry.started_at)  # all of it: it is a guess
    prompt = max(waiting, default=0) / US
    if ledger.foreign_prompt:
        prompt = max(prompt, rates.prefill(min(ledger.foreign_prompt, CHUNK)))
    bound = max(STILL_S, GAPS * instance.vital.gap_s) + factor * prompt
    # Without a step counter or a told speed, nobody can tell a long prompt from an engine that stands still.
    return bound + UNTOLD_S if ledger.pending and instance.stepped is None and not rates.told else bound


def _stalls(desk: Desk, instance: Instance) -> list[Effect]:
    """Streams that are silent while the instance works: each of them moves alone."""
    awake = desk.awake.now
    if instance.endpoint.kind != "llm" or not panic.elsewhere(desk.fleet, instance):
        return []
    rates, report = instance.rates, instance.ledger.report
    crowded = report is None or report.waiting != 0
    flowing = max(STALL_S, GAPS * instance.vital.gap_s)
    factor = PROMPT_FACTOR * (1 if rates.told else UNTOLD_FACTOR)
    effects: list[Effect] = []
    for seq, entry in instance.ledger.entries.items():
        silent = awake - entry.pulse.at
        if silent < flowing or not entry.pulse.heeded or entry.abandoned or not entry.slots:
            continue
        bound = flowing
        if crowded or not entry.started_at:
            bound += CROWDED_S + factor * (entry.due + rates.prefill(entry.total + entry.pulse.tokens))
        if not entry.started_at:  # an engine that steps may have others before it
            bound += STEPPING_S if instance.stepped is not None else 0.0 if rates.told else UNTOLD_S
        if silent >= bound:
            effects.append(judge.abandon(seq, entry, f"silent for {silent:.1f} s while {instance.id} works"))
    return effects


def _pace(desk: Desk, instance: Instance) -> None:
    ledger, pace = instance.ledger, instance.pace
    streams = sum(entry.slots for entry in ledger.entries.values() if entry.started_at and entry.pulse.heeded)
    pace.note(desk.awake.now, instance.vital.tokens, streams, instance.rates.step(ledger.resident_tokens()))
    endpoint = instance.endpoint
    pace.judge(desk.usual.get((endpoint.kind, endpoint.model), 0.0))


def _ramp(instance: Instance, now: float) -> None:
    assert instance.ramp_from is not None
    instance.share = ramp(now - instance.ramp_from)
    if instance.share >= 1.0:
        instance.ramp_from = None
