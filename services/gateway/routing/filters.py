"""Who may take a request at all: the same for every policy, each rejection with its word.

Words: excluded, draining, banned, lost, starting, suspect, ejected, unlike, feature:<name>, context_over,
context_under, no_room.
"""

from __future__ import annotations

from collections.abc import Sequence

from registry.endpoint import Capacity
from services.gateway.routing.facts import Facts
from services.gateway.routing.fleet import Instance
from services.gateway.routing.health import State

EDGE = 1.15  # an estimate may be so far off; near a range's edge the larger range is chosen
Rejected = tuple[tuple[str, str], ...]
_NOT_NOW = {
    State.DRAINING: "draining",
    State.BANNED: "banned",
    State.LOST: "lost",
    State.STARTING: "starting",
}
_LESS = (State.SUSPECT, State.EJECTED)


def eligible(pool: Sequence[Instance], facts: Facts, prompt: int) -> tuple[list[Instance], Rejected]:
    """Splits the instances of a model (sorted by id). Suspects, and after them ejected ones that answer, are taken
    where too few of the model are healthy (panic.py) and where no healthy one passes; the widest context range is
    taken, to give the exact refusal, where none is wide enough for an estimate."""
    passed: list[Instance] = []
    suspects: list[Instance] = []
    ejected: list[Instance] = []
    too_narrow: list[Instance] = []
    rejected: list[tuple[str, str]] = []
    plain = not facts.excluded and not facts.features and facts.kind == "llm" and facts.slots and facts.alike is None
    need = 0 if not plain else (prompt if facts.counted else round(prompt * EDGE)) + (facts.max_tokens or 1)
    for instance in pool:
        if plain and instance.state is State.HEALTHY:  # the common case, in a hot loop
            capacity = instance.endpoint.capacity
            if not capacity.context_min and (not capacity.context_max or need <= capacity.context_max):
                passed.append(instance)
                continue
        word = _word(instance, facts, prompt)
        if word == "":
            if instance.state not in _LESS or instance.spare:
                passed.append(instance)
            else:
                (suspects if instance.state is State.SUSPECT else ejected).append(instance)
            continue
        if word == "context_over":
            too_narrow.append(instance)
        rejected.append((instance.id, word))
    for tier in (suspects, ejected):
        if passed:
            rejected.extend((instance.id, instance.state.value) for instance in tier)
        else:
            passed = [instance for instance in tier if instance.is_linked]
            rejected.extend((instance.id, "lost") for instance in tier if not instance.is_linked)
    if not passed and too_narrow:
        widest = max(instance.endpoint.capacity.context_max for instance in too_narrow)
        if not facts.counted or prompt < widest:  # else nobody has to be asked
            passed = [instance for instance in too_narrow if instance.endpoint.capacity.context_max == widest]
            taken = {instance.id for instance in passed}
            rejected = [line for line in rejected if line[0] not in taken]
    rejected.sort()
    return passed, tuple(rejected)


def _word(instance: Instance, facts: Facts, prompt: int) -> str:
    if instance.id in facts.excluded:
        return "excluded"
    word = _NOT_NOW.get(instance.state)
    if word is not None:
        return word
    if facts.alike is not None and not facts.alike.fits(instance.endpoint):
        return "unlike"
    offered = instance.endpoint.features
    if offered and not facts.features <= offered:  # an instance that lists none has not told, and decides by itself
        return f"feature:{min(facts.features - offered)}"
    if facts.kind != "llm" or not facts.slots:  # encoders cut each text by themselves
        return ""
    return context_word(instance.endpoint.capacity, prompt, facts.max_tokens, facts.counted)


def context_word(capacity: Capacity, prompt: int, max_tokens: int, counted: bool) -> str:
    """Does prompt + answer fit the range served? Unknown ranges take everything."""
    if capacity.context_max:
        need = (prompt if counted else round(prompt * EDGE)) + (max_tokens or 1)
        if need > capacity.context_max:
            return "context_over"
    if max_tokens and prompt * (1 if counted else EDGE) + max_tokens < capacity.context_min:
        return "context_under"
    return ""
