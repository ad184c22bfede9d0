"""What a fleet file expects (`expect:`, `routing.split`), held against the arithmetic: what holds and what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploy.fleet import Fleet
from deploy.planner.architecture import dtype_of
from deploy.planner.catalogue import GIB
from deploy.planner.demand import load
from deploy.planner.memory import rule_of_thumb, weights
from deploy.planner.placed import Placed
from deploy.planner.roofline import LlmSpeed
from deploy.planner.shape import Shape
from deploy.planner.wanted import Wanted

DAY = 86400.0


def cached_share_for(speed: LlmSpeed, prompt: float, ttft_s: float) -> float:
    """The share of the prompt, 0 .. 1, that must be in the prefix cache for this time to the first token."""
    if speed.prefill_s(prompt) <= ttft_s:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        if speed.prefill_s(prompt * (1 - share), prompt * share) <= ttft_s:
            high = share
        else:
            low = share
    return high


def claims(fleet: Fleet, placed: Sequence[Placed], shapes: Mapping[str, Shape], wanted: Wanted) -> list[str]:
    primary = [one for one in placed if one.estimate.speed and one.instance.tier == "primary"]
    lines = []
    if primary:
        lines += _expected(fleet, primary, placed, wanted)
        lines += _split(fleet, placed, wanted)
    for model in fleet.models:
        shape = shapes.get(model.id)
        if shape and model.kind == "llm" and not shape.gguf:
            dtype = dtype_of(model, shape)
            own, rule = weights(shape, dtype).value, rule_of_thumb(shape, dtype).value
            lines.append(
                f"{model.id}: {own / GIB:.1f} GiB ({own / 1e9:.1f} GB) of weights in {dtype}; the rule of thumb, "
                f"parameters × bytes × 1.25, says {rule / 1e9:.1f} GB for all, whatever the context and the load"
            )
    return lines


def _expected(fleet: Fleet, primary: Sequence[Placed], placed: Sequence[Placed], wanted: Wanted) -> list[str]:
    expect = fleet.expect
    if expect is None:
        return []
    lines, demand = [], wanted.short
    best = min(primary, key=lambda one: one.estimate.speed.prefill_s(demand.prompt) if one.estimate.speed else 0.0)
    speed, sums = best.estimate.speed, best.estimate.memory
    assert speed is not None and sums is not None
    if expect.ttft_s:
        alone = speed.prefill_s(demand.prompt)
        share = cached_share_for(speed, demand.prompt, expect.ttft_s)
        verdict = "holds" if not share else "does not hold"
        line = (
            f"expect.ttft_s {expect.ttft_s:g}: {verdict} uncached: {demand.prompt:,.0f} tokens take {alone:.2f} s on "
        )
        lines.append(f"{line}{best.instance.id}" + (f"; it needs {share:.0%} of the prompt cached" if share else ""))
    if expect.concurrent:
        room = sums.concurrent.value
        verdict = "holds" if room >= expect.concurrent else "does not hold"
        lines.append(
            f"expect.concurrent {expect.concurrent:g}: {verdict}: {best.instance.id} has room for {room:.0f} requests "
            f"of {demand.length:,} tokens ({sums.kv_tokens.value:,.0f} KV tokens at "
            f"{sums.kv_token.value / 2**20:.4g} MiB each)"
        )
    if expect.card_tokens_per_s:
        llms = [one for one in placed if one.estimate.setup and one.instance.tier != "fallback"]
        cards = sum(one.estimate.setup.cards for one in llms if one.estimate.setup)
        tokens = sum(one.rate for one in llms) * demand.output / cards
        verdict = "holds" if tokens >= expect.card_tokens_per_s else "does not hold"
        alone_ms = speed.step_ms.value
        lines.append(
            f"expect.card_tokens_per_s {expect.card_tokens_per_s:g}: {verdict}: at the highest load under the "
            f"objective {cards} cards give {tokens:.0f} tokens/s each; one stream alone on {best.instance.id} gets "
            f"{1000 / alone_ms:.0f} tokens/s from its {best.estimate.setup.cards if best.estimate.setup else 0} cards"
        )
    if expect.requests_per_day:
        rate = sum(one.rate for one in placed if one.estimate.setup and one.instance.tier != "fallback")
        verdict = "holds" if rate * DAY >= expect.requests_per_day else "does not hold"
        lines.append(
            f"expect.requests_per_day {expect.requests_per_day:,.0f}: {verdict}: it is "
            f"{expect.requests_per_day / DAY:.2f} a second spread evenly, the LLM tiers take {rate:.2f} under the "
            "objective"
        )
    return lines


def _split(fleet: Fleet, placed: Sequence[Placed], wanted: Wanted) -> list[str]:
    """A fixed share between two device classes, beside what their speeds are in each phase."""
    told = fleet.routing.split
    if len(told) < 2:
        return []
    device = {node.name: node.device for node in fleet.nodes}
    rates: dict[str, list[float]] = {}
    for name in told:
        here = [one for one in placed if device.get(one.instance.node) == name and one.estimate.speed]
        speeds = [one.estimate.speed for one in here if one.estimate.speed]
        taken = [load(speed, wanted.short, 0.0) for speed in speeds]
        if not speeds or any(one is None for one in taken):
            return [f"routing.split: {name} has no LLM instance in this plan"]
        prefill = sum(speed.prefill_tps.value for speed in speeds)
        decode = sum(1000 / speed.step_ms.value for speed in speeds)
        rates[name] = [prefill, decode, len(speeds)]
    first, second = list(rates)[:2]
    ratio = told[first] / told[second]
    phases = [rates[first][index] / rates[second][index] for index in (0, 1)]
    each = [phase * rates[second][2] / rates[first][2] for phase in phases]
    low, high = min(phases), max(phases)
    both = low >= ratio * 0.9 and high <= ratio * 1.1
    verdict = "holds for both phases" if both else "does not hold for both phases"
    return [
        f"routing.split {first}:{second} = {told[first]:g}:{told[second]:g} ({ratio:.2f}): {verdict}: all {first} "
        f"together prefill {phases[0]:.2f} × as fast and decode {phases[1]:.2f} × as fast (instance against instance "
        f"{each[0]:.2f} and {each[1]:.2f}), so one ratio is wrong in one of them; the router prices each phase"
    ]
