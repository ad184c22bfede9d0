"""Instances that `min` and `max` make several of: A, A-2, A-3 … are replicas of A."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from deploy.fleet import Fault, Fleet, Instance
from deploy.launch.supervisor import Program, Supervisor


def least(first: Instance) -> int:
    return first.min or 1


def most(first: Instance) -> int:
    return max(least(first), first.max or 1)


def group_of(first: Instance) -> str:
    """The name that it is scaled by; empty: it is not."""
    return first.id if most(first) > least(first) else ""


def replica(first: Instance, number: int) -> Instance:
    """One of them; `number` counts from 1."""
    return first if number == 1 else first.model_copy(update={"id": f"{first.id}-{number}"})


def at_start(instances: Iterable[Instance]) -> Iterator[tuple[Instance, str]]:
    """All of them, as many as `min` says, each with its group."""
    for first in instances:
        for number in range(1, least(first) + 1):
            yield replica(first, number), group_of(first)


def replica_faults(fleet: Fleet) -> Iterator[Fault]:
    """What several instances of one kind cannot have alike."""
    ids = [instance.id for instance in fleet.instances]
    for index, first in enumerate(fleet.instances):
        if most(first) > 1 and first.telemetry:
            yield Fault(
                f"instances[{index}].telemetry", "is for one instance by its id; replicas have ids of their own"
            )
        for number in range(2, most(first) + 1):
            if (other := replica(first, number).id) in ids:
                yield Fault(f"instances[{index}].max", f"its replica {number} would be {other!r}, which is there")


@dataclass(slots=True)
class Replicas:
    """Scales classes of instances while they run; a class goes by the id of the instance in the file."""

    firsts: dict[str, Instance]
    supervisor: Supervisor
    program_of: Callable[[Instance, str], Program]  # of a replica and its group
    _members: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._members = {id: set(range(1, least(first) + 1)) for id, first in self.firsts.items()}

    @property
    def scaled(self) -> set[str]:
        """The classes that have more than one size."""
        return {id for id, first in self.firsts.items() if group_of(first)}

    def count(self, id: str) -> int:
        """Replicas that are wanted now; those that are leaving do not count."""
        return len(self._members[id])

    async def set(self, id: str, count: int) -> int:
        """Makes it so many, between its `min` and `max`; returns how many that is. The last ones go first: each
        leaves the registry, finishes what it is running, and only then gives its place back.
        """
        first, members = self.firsts[id], self._members[id]
        count = min(most(first), max(least(first), count))
        while len(members) > count:
            number = max(members)
            members.remove(number)
            await self.supervisor.remove(replica(first, number).id)
        while len(members) < count:
            # One that is still leaving keeps its name until it has left.
            number = next(n for n in range(1, 1 << 20) if replica(first, n).id not in self.supervisor.children)
            members.add(number)
            await self.supervisor.add(self.program_of(replica(first, number), group_of(first)))
        return count
