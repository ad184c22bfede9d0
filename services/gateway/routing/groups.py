"""The scaled groups of the fleet: what the router knows of their members, put to the law of scaling.py.

Several gateways share nothing and each has its own opinion; the highest one counts. That is right because each sees
the whole: an instance reports all its work, and tells every gateway of the lines of all others (`Line.others_s`), so
that opinions differ by one report and by what one gateway alone has learned. A sum would count all once for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.gateway.routing.fleet import Fleet, Instance
from services.gateway.routing.health import State
from services.gateway.routing.scaling import USUAL, Between, Group, Law, Seen

EVERY_S = 0.2
WORKING = (State.HEALTHY, State.PROBATION, State.SUSPECT, State.STARTING)
STUCK = (State.EJECTED, State.BANNED)  # one that is lost or drains is replaced by whoever started it
NO_BOUND = 0.0


@dataclass(frozen=True, slots=True)
class GroupView:
    """One group as this gateway sees it. Without a member so far, `kind` and `model` are empty and `desired` is 0,
    which is no opinion."""

    name: str
    kind: str
    model: str
    least: int
    most: int
    desired: int = 0
    replicas: int = 0
    use: float = 0.0
    short: str = ""
    backlog_s: float = 0.0
    why: str = ""


class Groups:
    def __init__(self, bounds: Mapping[str, Between], ttft_s: float, tpot_s: float, law: Law = USUAL) -> None:
        """`tpot_s` 0 = none is aimed at."""
        self._groups = {name: Group(between, law) for name, between in bounds.items()}
        self._served = dict.fromkeys(bounds, ("", ""))  # kind and model
        self._ttft_s, self._tpot_s = ttft_s, tpot_s
        self._looked = float("-inf")

    def look(self, fleet: Fleet, now: float) -> None:
        """To be called at every tick."""
        if not self._groups or now - self._looked < EVERY_S:
            return
        self._looked = now
        members: dict[str, list[Instance]] = {name: [] for name in self._groups}
        for instance in fleet.instances.values():
            if instance.endpoint.group in members:
                members[instance.endpoint.group].append(instance)
        for name, group in self._groups.items():
            here = members[name]
            if here:
                self._served[name] = (here[0].endpoint.kind, here[0].endpoint.model)
            stuck = sum(instance.state in STUCK and not instance.spare for instance in here)
            able = [instance for instance in here if instance.state in WORKING or instance.spare]
            group.look([seen(instance, self._tpot_s, now) for instance in able], stuck, self._ttft_s, now)

    def views(self) -> Sequence[GroupView]:
        """Sorted by name."""
        return [self._view(name) for name in sorted(self._groups)]

    def _view(self, name: str) -> GroupView:
        group, (kind, model) = self._groups[name], self._served[name]
        between, verdict = group.between, group.verdict
        if verdict is None:
            return GroupView(name, kind, model, between.least, between.most)
        told = (verdict.desired, verdict.replicas, verdict.use, verdict.short, verdict.backlog_s, verdict.why)
        return GroupView(name, kind, model, between.least, between.most, *told)


def seen(instance: Instance, tpot_s: float, now: float) -> Seen:
    """What the ledger, the last report and the line say of one member."""
    if instance.state is State.STARTING:
        return Seen()
    ledger, rates, capacity = instance.ledger, instance.rates, instance.endpoint.capacity
    wait = ledger.wait_s(now)
    # Averaged over time, "is it computing a prompt" is the part of the time in which it does.
    prefill = 1.0 if wait > 0 else 0.0
    decode, idle_step = NO_BOUND, rates.step(0)
    if tpot_s > idle_step > 0:  # prompts take their part of the time, steps the rest: 1 where a token takes `tpot_s`
        longer = rates.step(ledger.resident_tokens()) - idle_step
        decode = (prefill * tpot_s + longer) / (tpot_s - idle_step)
    kv = ledger.kv_used(capacity.kv_tokens) / capacity.kv_tokens if capacity.kv_tokens else NO_BOUND
    slots = ledger.running() / capacity.max_running if capacity.max_running else NO_BOUND
    line = instance.line
    backlog = wait + line.all_s * (instance.crowd() if line.all_count else 1.0)
    return Seen((prefill, decode, kv, slots), backlog, late=line.count > 0 and sum(line.late_sizes) > 0)
