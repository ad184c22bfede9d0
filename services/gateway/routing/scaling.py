"""How many replicas a group of like instances should have. The law alone: values in, a number out.

The unit is the group: instances that differ in nothing but their id, which is what an operator scales (a Deployment, a
class of the Ray launcher). What a group needs is the sum of its members' use of whatever runs out first, over the share
that may be in use, plus what it takes to work off a backlog that the objective does not allow.

Up when that has been more for a moment, down when the highest need of a whole cool-down leaves room to spare, by a
quarter at most: a model takes minutes to load, and whoever leaves takes a warm cache along. A number that nobody told
counts as the very use at which a group neither grows nor shrinks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, exp, isfinite

RESOURCES = ("prefill", "decode", "kv", "slots")
OVERUSED = 2.0  # one member counts as no fuller than this
_DUST = 1e-9
_MANY = 1e6


@dataclass(frozen=True, slots=True)
class Between:
    """How many replicas a group may have. The caller checks 1 <= least <= most."""

    least: int
    most: int

    def clamp(self, count: int) -> int:
        return min(max(count, self.least), self.most)


@dataclass(frozen=True, slots=True)
class Law:
    """`busy`: part of a resource that may be in use, beyond which the group grows; `idle`: it shrinks only to a size at
    which no more than this would be. `drain_s`: within which a backlog beyond the objective should be gone.
    `smooth_s`: time constant of what is averaged. `up_s`, `cool_s`: how long a need must have lasted, to grow and to
    shrink; `cool_s` also lies between any change and a smaller number. `part`: of the group that may leave at once."""

    busy: float = 0.6
    idle: float = 0.45
    drain_s: float = 120.0
    smooth_s: float = 20.0
    up_s: float = 15.0
    cool_s: float = 300.0
    part: float = 0.25


USUAL = Law()


@dataclass(frozen=True, slots=True)
class Seen:
    """One member that works, or will at once. `used`: of each of RESOURCES, the part in use, 0 where there is no such
    bound; None = nobody told. `backlog_s`: seconds of prompts queued there and waiting for it, at all gateways. `late`:
    somebody waits for it whose first token cannot come within the objective."""

    used: tuple[float | None, ...] = (None, None, None, None)
    backlog_s: float = 0.0
    late: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """`replicas`: members seen; `use`: of the resource named `short`, over all members, as smoothed; `backlog_s`: mean
    of what is queued and waiting for a member. `why`: the reason of the last change."""

    desired: int
    replicas: int
    use: float
    short: str
    backlog_s: float
    why: str


@dataclass(slots=True)
class Highest:
    """The highest of the values noted within the last so many seconds (a monotonic queue)."""

    seconds: float
    _kept: deque[tuple[float, int]] = field(default_factory=deque)

    def note(self, value: int, now: float) -> int:
        kept = self._kept
        while kept and kept[-1][1] <= value:
            kept.pop()
        kept.append((now, value))
        while kept[0][0] < now - self.seconds:
            kept.popleft()
        return kept[0][1]


class Group:
    """One group as one gateway sees it. Until it has seen a member it has no opinion."""

    def __init__(self, between: Between, law: Law = USUAL) -> None:
        self.between = between
        self.verdict: Verdict | None = None
        self._law = law
        self._most_needed, self._least_needed = Highest(law.cool_s), Highest(law.up_s)  # the second one negated
        self._used = [0.0] * len(RESOURCES)  # summed over members, smoothed
        self._excess_s = 0.0  # of backlog beyond the objective, all members, smoothed
        self._at = self._born = self._changed = 0.0

    def look(self, members: Sequence[Seen], stuck: int, objective_s: float, now: float) -> Verdict | None:
        """`stuck`: members that hold a place, do not work, and that nobody will replace (ejected, banned): they count
        for nothing, and are needed on top. `objective_s`: seconds to the first token that are aimed at."""
        before = self.verdict
        count = len(members) + stuck
        if before is None:
            if not members:
                return None
            self._at = self._born = self._changed = now
            self._used = [self._law.busy * len(members)] * len(RESOURCES)
            before = Verdict(self.between.clamp(count), count, self._law.busy, "", 0.0, "as found")
        if not members or now - self._at > self._law.up_s:  # all out of reach, or nobody looked: no evidence of a need
            self._most_needed.note(before.desired, now)
            self._least_needed.note(-before.desired, now)
        if not members:
            self._at = now
            self.verdict = replace(before, replicas=count)
            return self.verdict
        short, backlog_s = self._take_in(members, objective_s, now)
        behind = any(seen.late for seen in members) or backlog_s > objective_s
        used, late = self._used[short], self._excess_s / self._law.drain_s
        grow = max(_whole(used / self._law.busy + late), len(members) + 1 if behind else 0) + stuck
        keep = max(grow, _whole(used / self._law.idle + late) + stuck, before.desired if behind else 0)
        desired, why = self._move(before, count, grow, keep, now)
        if why:
            why = f"{why}: {RESOURCES[short]} {used / len(members):.0%} used"
            why += f", {backlog_s:.1f} s of prompts wait for each" if behind else ""
        use = used / len(members)
        self.verdict = Verdict(desired, count, use, RESOURCES[short], backlog_s, why or before.why)
        return self.verdict

    def _take_in(self, members: Sequence[Seen], objective_s: float, now: float) -> tuple[int, float]:
        """Which resource is the shortest, and the mean backlog."""
        law = self._law
        share = 1.0 - exp(-min(max(0.0, now - self._at), law.smooth_s) / law.smooth_s)
        self._at = now
        for number in range(len(RESOURCES)):
            used = sum(_used(seen.used[number], law.busy) for seen in members)
            self._used[number] += share * (used - self._used[number])
        backlogs = [min(seen.backlog_s, _MANY) if isfinite(seen.backlog_s) else 0.0 for seen in members]
        excess = sum(max(0.0, backlog - objective_s) for backlog in backlogs)
        self._excess_s += share * (excess - self._excess_s)
        short = max(range(len(RESOURCES)), key=lambda number: self._used[number])
        return short, sum(backlogs) / len(backlogs)

    def _move(self, before: Verdict, count: int, grow: int, keep: int, now: float) -> tuple[int, str]:
        """The number wanted, and in a word why it is another one."""
        law, desired = self._law, before.desired
        lasting = -self._least_needed.note(-self.between.clamp(grow), now)
        highest = self._most_needed.note(self.between.clamp(keep), now)
        if now - self._born < law.cool_s:  # a gateway that has just come takes what it finds for wanted
            desired = max(desired, self.between.clamp(count))
        if now - self._born >= law.up_s and lasting > desired:
            self._changed = now
            return lasting, "more"
        if now - self._changed >= law.cool_s and highest < desired:
            self._changed = now
            return max(highest, desired - max(1, int(desired * law.part))), "fewer"
        return desired, ""


def _used(told: float | None, prior: float) -> float:
    if told is None or not isfinite(told):
        return prior
    return min(max(told, 0.0), OVERUSED)


def _whole(need: float) -> int:
    return ceil(min(need, _MANY) - _DUST)
