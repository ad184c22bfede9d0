"""Where the LLMs go: the primary tier, the long-context tier, the fallback model, and models that span hosts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from deploy.fleet import Instance, Model
from deploy.planner.architecture import dtype_of
from deploy.planner.catalogue import GIB
from deploy.planner.choose import Choice, Group, choose, groups_of, too_small
from deploy.planner.demand import Demand, Load, load, most
from deploy.planner.estimate import CPU_KV_GIB, Estimate
from deploy.planner.hosts import Host
from deploy.planner.layout import Layout, dtype_on, engine_of, layouts
from deploy.planner.memory import MAX_RUNNING, memory
from deploy.planner.placed import Placed, Tier
from deploy.planner.shape import Shape
from deploy.planner.wanted import HEADROOM, Wanted

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CPU_REQUESTS = 8
SERVER_PORT = 8080  # of adopted servers; the n-th of a host listens n ports further


@dataclass(slots=True)
class Found:
    """What a step has placed. `hosts`: all hosts with the cards that are left."""

    hosts: list[Host]
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    placed: list[Placed] = field(default_factory=list)
    tiers: list[Tier] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def placed_on(self, node: str) -> int:
        """How many instances the node has by now."""
        return sum(one.instance.node == node for one in self.placed)

    def take(self, host: Host, cards: Sequence[int], used: float = 0.0) -> None:
        """Cards are taken whole; of a CPU host `used` bytes."""
        self.hosts = [one.without(cards, used) if one.node.name == host.node.name else one for one in self.hosts]


def place_primary(model: Model, shape: Shape, dtype: str, found: Found, wanted: Wanted) -> bool:
    """The model on every host whose engine of today runs it; on older cards only where there is no other. False: it
    fits on no host."""
    for engine in ("vllm", "openai-http"):
        able = [host for host in found.hosts if host.free and engine_of(shape, host.card) == engine]
        able = [host for host in able if not host.card.cpu] or able  # an LLM on a CPU is what is left, not a helper
        threshold = min(wanted.threshold, shape.max_context)
        groups = groups_of(shape, dtype, able, wanted.short, ("fp16", "fp8"), threshold)
        if groups:
            break
    else:
        return False
    able = [host for group in groups for host in group.hosts]
    long = _long_hosts(shape, dtype, able, wanted, threshold, found)
    names = {host.node.name for host, _ in long}
    rest = [host for host in able if host.node.name not in names]
    for host, layout in long:
        _put_long(model, shape, dtype, host, layout, wanted, found, able)
    short = replace(wanted, long=None) if not long else wanted
    _put_short(model, shape, dtype, rest, short, threshold, found, alone=not long)
    if long and wanted.long:
        layout, count = long[0][1], len(long) * long[0][1].count
        capacity = sum(layout.total for _, layout in long)
        eased = replace(wanted.long, ttft_s=math.inf, tpot_ms=math.inf)
        seen = load(layout.speed, wanted.long, wanted.long.rate / count)
        tier = _tier(model.id, "long-context", wanted.long, capacity, seen)
        if not capacity:
            rate = most(layout.speed, eased, layout.memory.concurrent.value)
            tier = replace(tier, capacity=rate * count, held=False)
        found.tiers.append(tier)
    return True


def _long_hosts(
    shape: Shape, dtype: str, able: Sequence[Host], wanted: Wanted, threshold: int, found: Found
) -> list[tuple[Host, Layout]]:
    """The hosts of the long-context tier: those of the card whose host holds the most long requests, as many as the
    rate needs and one more in case one dies, and never all."""
    far = wanted.long
    if far is None or far.length <= threshold:
        return []
    if far.length > shape.max_context:
        found.remarks.append(
            f"prompts of {far.prompt:,.0f} tokens are beyond the model's {shape.max_context:,}: nobody can serve them"
        )
        return []
    ranked: list[tuple[float, float, Host, Layout]] = []
    for host in able:
        options = layouts(shape, dtype, host, far, ("fp16",), far.length)
        if options:
            best = max(options, key=lambda one: (one.total, one.count * one.memory.concurrent.value))
            ranked.append((best.count * best.memory.concurrent.value, -best.speed.prefill_tps.value, host, best))
    if not ranked:
        found.short.append(f"prompts of {far.prompt:,.0f} tokens fit on no host: more or larger cards, or fp8 KV")
        return []
    if len(able) == 1:
        found.remarks.append("one host only: long prompts share it with all others, there is no tier of their own")
        return []
    card = max(ranked, key=lambda one: one[:2])[2].card.name
    alike = [(host, layout) for _, _, host, layout in ranked if host.card.name == card]
    each = alike[0][1].total
    need = max(1, math.ceil(far.rate * HEADROOM / each)) if each else len(alike)
    return alike[: min(need + 1, len(alike), len(able) - 1)]


def _put_long(
    model: Model,
    shape: Shape,
    dtype: str,
    host: Host,
    layout: Layout,
    wanted: Wanted,
    found: Found,
    able: Sequence[Host],
) -> None:
    far = wanted.long
    assert far is not None
    one = layout.memory.kv_token.value * far.length / 2**30
    per = layout.count * layout.memory.concurrent.value
    reasons = [
        f"one request of {far.length:,} tokens takes {one:.1f} GiB of KV; a host of {host.card.name} at {layout.text} "
        f"holds {per:.0f} of them" + _others(shape, dtype, host, far, able)
    ]
    high = min(shape.max_context, int(layout.memory.kv_tokens.value))
    reasons.append(f"range up to {high:,} tokens; short work too, at a price: its KV room is what long prompts need")
    _put(model, host, layout, "long-context", (0, high), reasons, far, found)


def _others(shape: Shape, dtype: str, host: Host, far: Demand, able: Sequence[Host]) -> str:
    """What the other cards would hold."""
    told, seen = [], {host.card.name}
    for other in able:
        if other.card.name in seen:
            continue
        seen.add(other.card.name)
        options = layouts(shape, dtype, other, far, ("fp16",))
        best = max((one.count * one.memory.concurrent.value for one in options), default=0.0)
        told.append(f"{other.card.name} {best:.0f}")
    return f" (other cards: {', '.join(told)})" if told else ""


def _put_short(
    model: Model,
    shape: Shape,
    dtype: str,
    hosts: Sequence[Host],
    wanted: Wanted,
    threshold: int,
    found: Found,
    *,
    alone: bool,
) -> None:
    """The primary tier. Groups share the demand in proportion to what they could take at their best; a group that
    cannot hold the objective is used only where the others do not suffice."""
    demand = wanted.short
    groups = groups_of(shape, dtype, hosts, demand, ("fp16", "fp8"), threshold)
    able = [group for group in groups if group.best]
    total = sum(group.best for group in able)
    asked = demand.rate * HEADROOM
    used = able if total >= asked else [*able, *(group for group in groups if not group.best)]
    choices: list[tuple[Group, Choice]] = []
    for group in used or groups:
        needed = asked * group.best / total if total else asked / len(groups)
        choices.append((group, choose(group, demand, needed)))
    for group, choice in choices:
        high = shape.max_context if alone else threshold
        high = min(high, int(choice.layout.memory.kv_tokens.value))
        reasons = [*choice.reasons, *too_small(shape, dtype, group, choice.layout, demand)]
        for host in group.hosts:
            _put(model, host, choice.layout, "primary", (0, high), reasons, demand, found)
    held = [(group, choice) for group, choice in choices if choice.held]
    capacity = sum(choice.layout.total * len(group.hosts) for group, choice in held or choices)
    if capacity:
        lead = max(held or choices, key=lambda one: one[1].layout.total * len(one[0].hosts))[1].layout
        seen = load(lead.speed, demand, min(demand.rate, capacity) * lead.rate / capacity)
        found.tiers.append(replace(_tier(model.id, "primary", demand, capacity, seen), held=bool(held)))


def _tier(model: str, tier: str, demand: Demand, capacity: float, seen: Load | None) -> Tier:
    return Tier(model, tier, demand.rate, capacity, seen.ttft_s if seen else None, seen.tpot_ms if seen else None)


def place_fallback(model: Model, shape: Shape, dtype: str, found: Found, wanted: Wanted) -> bool:
    """The fallback model on the oldest cards that hold it, one instance of the smallest size after another. False: it
    fits nowhere that is free."""
    free = [host for host in found.hosts if host.free and engine_of(shape, host.card)]
    for host in sorted(free, key=_age):
        options = layouts(shape, dtype, host, replace(wanted.short, ttft_s=math.inf, tpot_ms=math.inf), ("fp16",))
        if not options:
            continue
        layout = options[0]
        high = min(shape.max_context, int(layout.memory.kv_tokens.value))
        reasons = [
            f"the fallback model: {host.card.name} ({host.card.generation.name}) is the oldest card that holds it, and "
            "nothing else here needs it",
            f"{layout.text}: room for {high:,} KV tokens, {layout.memory.concurrent.value:.0f} request(s) of "
            f"{wanted.short.length:,} tokens at a time; {wanted.short.prompt:,.0f} tokens take "
            f"{layout.speed.prefill_s(wanted.short.prompt):.1f} s: an answer in need, not a fast one",
        ]
        alike = [one for one in free if one.card.name == host.card.name]
        for one in alike:
            _put(model, one, layout, "fallback", (0, high), reasons, wanted.short, found)
        capacity = layout.total * len(alike)
        found.tiers.append(Tier(model.id, "fallback", 0.0, capacity, None, layout.speed.step_ms.value))
        return True
    return False


def _age(host: Host) -> tuple[float, float]:
    key = host.card.generation.key
    return (float(key) if key[0].isdigit() else 99.0, host.card.bandwidth_gbs)


def _put(
    model: Model,
    host: Host,
    layout: Layout,
    tier: str,
    context: tuple[int, int],
    reasons: Sequence[str],
    demand: Demand,
    found: Found,
) -> None:
    """Fills the host with instances of one layout."""
    size, engine = layout.setup.cards, layout.setup.engine
    shape = found.shapes[model.id]
    note = host.card.generation.engines[engine].note
    _, other = dtype_on(host.card, engine, dtype_of(model, shape))
    said = [*reasons, *([other] if other else []), *([f"{host.card.generation.sm}: {note}"] if note else [])]
    if engine == "vllm" and layout.setup.dtype in ("int4", "int8") and not shape.quantization:
        said.append(
            f"fill in `quantization` (awq, gptq …): the file does not say how the {layout.setup.dtype} weights are made"
        )
    if host.card.cpu:
        layout = _on_cpu(shape, host, layout)
    for number in range(layout.count):
        cards = host.free[number * size : (number + 1) * size]
        instance = _instance(model, shape, host, layout, cards, found)
        seen = load(layout.speed, demand, 0.0)
        found.placed.append(
            Placed(
                instance.model_copy(update={"tier": tier, "context": context}),
                tuple(said),
                Estimate(layout.setup, layout.memory, layout.speed),
                rate=layout.rate,
                ttft_s=seen.ttft_s if seen else None,
                tpot_ms=seen.tpot_ms if seen else None,
            )
        )
    sums = layout.memory
    used = sums.weights.value + sums.overhead.value + sums.room.value
    found.take(host, host.free[: size * layout.count], used)


def _on_cpu(shape: Shape, host: Host, layout: Layout) -> Layout:
    """With no more KV room than a few requests need: vLLM is told the bytes there, and other processes want memory."""
    sums = layout.memory
    wanted = max(GIB, CPU_REQUESTS * layout.setup.length * sums.kv_token.value)
    room = max(1, min(int(sums.room.value / GIB), math.ceil(wanted / GIB))) * GIB  # the variable takes whole GiB
    ratio = (sums.weights.value + sums.overhead.value + room) / host.card.memory
    setup = replace(layout.setup, ratio=ratio)
    return replace(layout, setup=setup, memory=memory(shape, setup, host.card))


def _instance(model: Model, shape: Shape, host: Host, layout: Layout, cards: tuple[int, ...], found: Found) -> Instance:
    """How the file writes it. An engine that is not ours gets the address that its server has to listen on."""
    setup = layout.setup
    index = found.placed_on(host.node.name)
    told: dict[str, object] = {"id": _name(host, layout, index, found), "model": model.id, "node": host.node.name}
    if not host.card.cpu:
        told["cards"] = cards
    if setup.engine == "vllm":
        told |= {"tp": setup.tp, "pp": setup.pp, "max_running": MAX_RUNNING, "quantization": shape.quantization}
        told["kv_cache_dtype"] = "fp8" if setup.kv_dtype == "fp8" else ""
        if host.card.cpu:
            told["environment"] = {CPU_KV_GIB: str(round(layout.memory.room.value / GIB))}
        return Instance.model_validate(told)
    address = host.node.address or host.node.name
    told |= {"engine": setup.engine, "url": f"http://{address}:{SERVER_PORT + index}/v1"}
    told |= {"max_running": max(1, int(layout.memory.concurrent.value))}
    return Instance.model_validate(told | {"kv_tokens": int(layout.memory.kv_tokens.value)})


def _name(host: Host, layout: Layout, index: int, found: Found) -> str:
    """The host's name where it holds one instance, else with a letter; one that nobody has."""
    taken = {one.instance.id for one in found.placed}
    if layout.count == 1 and not index and host.node.name not in taken:
        return host.node.name
    while (name := f"{host.node.name}-{LETTERS[index % 26]}{index // 26 or ''}") in taken:
        index += 1
    return name
