"""Which of the ways to run a model on a host is taken, and why. The smallest instance that does it wins: it talks
least between cards, and more, smaller instances lose less when one dies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploy.planner.catalogue import GIB
from deploy.planner.demand import Demand, most
from deploy.planner.hosts import Host
from deploy.planner.layout import QUALITY, Layout, dtype_on, engine_of, layouts
from deploy.planner.memory import Setup, memory
from deploy.planner.shape import Shape, tp_fault

WORTH = 1.1  # a smaller KV dtype must give this much more to be taken where nothing meets the demand


@dataclass(frozen=True, slots=True)
class Choice:
    """`held`: under the objective as it was asked; else what was let go of is in `reasons`."""

    layout: Layout
    held: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Hosts that are alike, with the ways to run one model on each of them."""

    hosts: tuple[Host, ...]
    options: tuple[Layout, ...]

    @property
    def best(self) -> float:
        """Requests/s of all its hosts at their best."""
        return max((option.total for option in self.options), default=0.0) * len(self.hosts)


def groups_of(
    shape: Shape, dtype: str, hosts: Sequence[Host], demand: Demand, kv: tuple[str, ...], context: int
) -> list[Group]:
    """Hosts by card, joint and free cards; those on which nothing fits are left out."""
    found: dict[tuple[str, bool, int], list[Host]] = {}
    for host in hosts:
        found.setdefault((host.card.name, host.nvlink, len(host.free)), []).append(host)
    groups = []
    for alike in found.values():
        options = layouts(shape, dtype, alike[0], demand, kv, context) or layouts(shape, dtype, alike[0], demand, kv)
        if options:
            groups.append(Group(tuple(alike), tuple(options)))
    return groups


def choose(group: Group, demand: Demand, needed: float) -> Choice:
    """The layout of each host of a group, of which `needed` requests/s are asked together."""
    each = needed / len(group.hosts)
    enough = [one for one in group.options if one.rate > 0 and one.total >= each]
    if enough:
        taken = min(enough, key=lambda one: (one.setup.kv_dtype != "fp16", one.setup.cards))
        return Choice(taken, True, tuple(_against(group, taken, demand, each)))
    if group.best:
        taken = _most(group.options)
        why = (
            f"no layout takes the {each:.2f} requests/s asked of each host; {taken.text} takes most, {taken.total:.2f}"
        )
        return Choice(taken, True, (why, *_quality(taken)))
    eased = [replace(demand, ttft_s=float("inf")), replace(demand, ttft_s=float("inf"), tpot_ms=float("inf"))]
    for softer, word in zip(eased, ("TTFT", "TTFT and time per token"), strict=True):
        rated = [replace(one, rate=_rate(one, softer)) for one in group.options]
        if any(one.rate > 0 for one in rated):
            enough = [one for one in rated if one.total >= each] or [_most(rated)]
            taken = min(enough, key=lambda one: (one.setup.kv_dtype != "fp16", one.speed.prefill_s(demand.prompt)))
            first = taken.speed.prefill_s(demand.prompt)
            why = (
                f"the objective on {word} cannot be held on {group.hosts[0].card.name}: {demand.prompt:,.0f} uncached "
                f"tokens take {first:.2f} s at best ({taken.text}), a step {taken.speed.step_ms.value:.0f} ms"
            )
            return Choice(taken, False, (why, *_quality(taken)))
    taken = group.options[-1]
    return Choice(taken, False, ("it fits, and holds no request of the planned length beside another",))


def _rate(one: Layout, demand: Demand) -> float:
    return most(one.speed, demand, one.memory.concurrent.value)


def _most(options: Sequence[Layout]) -> Layout:
    plain = [one for one in options if one.setup.kv_dtype == "fp16"] or list(options)
    best = max(plain, key=lambda one: one.total)
    packed = max(options, key=lambda one: one.total)
    return packed if packed.total > WORTH * best.total else best


def _quality(taken: Layout) -> list[str]:
    return [f"costs quality: {QUALITY['kv fp8']}"] if taken.setup.kv_dtype == "fp8" else []


def _against(group: Group, taken: Layout, demand: Demand, each: float) -> list[str]:
    """The sum of the layout that is taken, what is wrong with every smaller one, and what a larger one would change."""
    sums, host = taken.memory, group.hosts[0]
    reasons = [
        f"{taken.text}: {sums.weights.value / GIB:.1f} GiB of weights a card, {sums.kv_tokens.value:,.0f} KV tokens "
        f"= {sums.concurrent.value:.0f} requests of {demand.length:,}; {demand.prompt:,.0f} uncached tokens take "
        f"{taken.speed.prefill_s(demand.prompt):.2f} s, a step {taken.speed.step_ms.value:.0f} ms"
    ]
    plain = [one for one in group.options if one.setup.kv_dtype == taken.setup.kv_dtype and one.setup.pp == 1]
    for one in plain:
        if one.setup.cards < taken.setup.cards:
            first = one.speed.prefill_s(demand.prompt)
            if one.rate == 0 and first > demand.ttft_s:
                why = f"{first:.2f} s for an uncached prompt is over the objective of {demand.ttft_s:g} s"
            elif one.rate == 0:
                why = f"a step takes {one.speed.step_ms.value:.0f} ms, the objective is {demand.tpot_ms:g}"
            else:
                why = f"takes {one.total:.2f} requests/s a host of the {each:.2f} asked"
            reasons.append(f"not {one.text}: {why}")
    larger = [one for one in plain if one.setup.cards > taken.setup.cards and one.rate > 0]
    if larger:
        other = max(larger, key=lambda one: one.total)
        change = "more" if other.total > taken.total else "less"
        reasons.append(
            f"{other.text} would take {other.total:.2f} requests/s a host instead of {taken.total:.2f}, {change}, with "
            f"{other.count} instead of {taken.count} instances a host to lose"
        )
    if host.card.nvlink_gbs and taken.setup.tp > 1:
        reasons.append("TP stays inside the host" + (", over NVLink" if host.nvlink else "; no NVLink here: over PCIe"))
    return reasons + _quality(taken)


def too_small(shape: Shape, dtype: str, group: Group, taken: Layout, demand: Demand) -> list[str]:
    """Sizes below the one taken that hold no request at all, with the sum."""
    host, reasons = group.hosts[0], []
    engine = engine_of(shape, host.card)
    loaded, _ = dtype_on(host.card, engine, dtype)
    held = {one.setup.cards for one in group.options}
    for tp in range(1, taken.setup.cards):
        if tp in held or len(host.free) % tp:
            continue
        if fault := tp_fault(shape, tp, loaded):
            reasons.append(f"not TP{tp}: {fault}")
            continue
        sums = memory(shape, Setup(loaded, demand.length, tp, engine=engine), host.card)
        if sums.room.value <= 0:
            why = f"{sums.weights.value / GIB:.1f} GiB of weights a card leave no room for KV"
        else:
            why = f"room for {sums.kv_tokens.value:,.0f} KV tokens, one request takes {demand.length:,}"
        reasons.append(f"not TP{tp}: {why}")
    return reasons
