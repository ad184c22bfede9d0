"""When too few of a model's instances are healthy, the least bad of the others serve too.

Envoy's panic threshold, with a choice: those on probation, then suspects, then ejected ones come back until half of the
pool serves. Whoever has no connection, drains or is banned never does.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.routing.fleet import Fleet, Instance
from services.gateway.routing.health import State

LEAST_BAD = (State.PROBATION, State.SUSPECT, State.EJECTED)
EJECTED_SHARE = 0.1  # an instance that fails at once looks idle, and would draw everything
AWAY = (State.DRAINING, State.BANNED)


def settle(fleet: Fleet, changed: Instance) -> None:
    """Says anew who serves though not healthy, in every pool of an instance whose state changed."""
    for pool in fleet.pools_of(changed):
        spare = spares(pool)
        for instance in pool:
            instance.spare = instance in spare


def spares(pool: Sequence[Instance]) -> list[Instance]:
    here = [instance for instance in pool if instance.state not in AWAY]
    missing = -(-len(here) // 2) - sum(instance.state is State.HEALTHY for instance in here)
    if missing <= 0:
        return []
    able = [instance for instance in here if instance.state in LEAST_BAD and instance.is_linked]
    able.sort(key=lambda instance: (LEAST_BAD.index(instance.state), instance.tally.in_a_row, instance.id))
    return able[:missing]


def may_eject(fleet: Fleet, instance: Instance) -> bool:
    """Whether one more of each of its pools may go on mere suspicion: at most half of them, dead ones counted."""
    for pool in fleet.pools_of(instance):
        here = [other for other in pool if other.state not in AWAY]
        out = sum(
            other.state in (State.LOST, State.EJECTED, State.PROBATION) for other in here if other is not instance
        )
        if 2 * (out + 1) > len(here):
            return False
    return True


def elsewhere(fleet: Fleet, instance: Instance) -> bool:
    """Whether anybody else could take its work."""
    able = (State.HEALTHY, State.PROBATION, State.SUSPECT)
    return any(other is not instance and other.state in able for pool in fleet.pools_of(instance) for other in pool)
