"""A plan for people: tables on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from deploy.planner.catalogue import GIB

if TYPE_CHECKING:
    from deploy.planner.placed import Placed, Plan, Tier

WIDE = 150  # where the output is no terminal


def show(plan: Plan, verdict: dict[str, Any] | None, name: str) -> None:
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=WIDE)
    console.print(f"{name}: {len(plan.placed)} instances on {len(plan.fleet.nodes)} nodes")
    console.print(_instances(plan))
    console.print(_tiers(plan.tiers))
    _lines(console, "Why", [f"{who}: {reason}" for who, reason in _reasons(plan.placed)])
    _lines(console, "Start by hand", [f"{host}: {line}" for one in plan.placed for host, line in one.commands.items()])
    _lines(console, "Falls short", plan.short)
    _lines(console, "Held against the arithmetic", plan.claims)
    _lines(console, "Assumed", plan.remarks)
    if verdict:
        console.print(_verdict(verdict))


def _instances(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (
        "INSTANCE",
        "MODEL",
        "CARDS",
        "SPLIT",
        "TIER",
        "RANGE",
        "WEIGHTS",
        "KV TOKENS",
        "ROOM",
        "TTFT",
        "STEP",
    ):
        table.add_column(column, overflow="fold", no_wrap=column == "INSTANCE")
    for one in plan.placed:
        table.add_row(*_row(plan, one))
    return table


def _row(plan: Plan, one: Placed) -> Sequence[str]:
    item, estimate = one.instance, one.estimate
    node = next((node for node in plan.fleet.nodes if node.name == item.node), None)
    device = node.device if node else ""
    cards = f"{device} {_range(item.cards)}".strip()
    if estimate.setup and estimate.memory:
        setup, sums = estimate.setup, estimate.memory
        split = f"TP{setup.tp}" + (f" PP{setup.pp}" if setup.pp > 1 else "")
        high = f"≤ {item.context[1]:,}" if item.context else "all"
        return (
            *(item.id, item.model, cards, split, item.tier, high),
            f"{sums.weights.value * setup.cards / GIB:.1f} GiB",
            f"{sums.kv_tokens.value:,.0f}",
            f"{sums.concurrent.value:.0f} × {setup.length:,}",
            "-" if one.ttft_s is None else f"{one.ttft_s:.2f} s",
            "-" if estimate.speed is None else f"{estimate.speed.step_ms.value:.0f} ms",
        )
    need = f"{estimate.need.value / GIB:.1f} GiB" if estimate.need else "-"
    kind = plan.fleet.model(item.model).kind
    return (item.id, item.model, cards, f"× {item.replicas}", kind, "", need, "", "", "", "")


def _range(cards: Sequence[int]) -> str:
    return f"{cards[0]}–{cards[-1]}" if len(cards) > 1 else ",".join(map(str, cards))


def _tiers(tiers: Sequence[Tier]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("MODEL", "TIER", "ASKED", "TAKES", "HEADROOM", "TTFT AT THAT LOAD", "PER TOKEN"):
        table.add_column(column)
    for tier in tiers:
        unit = "tokens/s" if tier.tier in ("embedding", "rerank") else "requests/s"
        table.add_row(
            *(tier.model, tier.tier),
            f"{tier.wanted:,.3g} {unit}" if tier.wanted else "in need",
            f"{tier.capacity:,.3g} {unit}" if tier.capacity < 1000 else f"{tier.capacity:,.0f} {unit}",
            "-" if tier.headroom is None else f"{tier.headroom:+.0%}",
            "-" if tier.ttft_s is None else f"{tier.ttft_s:.2f} s",
            "-" if tier.tpot_ms is None else f"{tier.tpot_ms:.0f} ms",
        )
    return table


def _reasons(placed: Sequence[Placed]) -> list[tuple[str, str]]:
    """Each reason once, with all instances that it holds for."""
    who: dict[tuple[str, str], list[str]] = {}
    for one in placed:
        for reason in one.reasons:
            who.setdefault((one.instance.model, reason), []).append(one.instance.id)
    shown = []
    for (_, reason), ids in who.items():
        shown.append((ids[0] if len(ids) == 1 else f"{ids[0]} … {ids[-1]}", reason))
    return shown


def _lines(console: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        console.print(f"{title}:")
        for line in lines:
            console.print(f"  • {line}")
        console.print()


def _verdict(said: dict[str, Any]) -> str:
    if said["ttft_mean_s"] is None:
        return "Simulated with the very router: nobody was served."
    word = "holds" if said["holds"] else "does not hold"
    times = f"TTFT mean {said['ttft_mean_s']:.2f} s, p99 {said['ttft_p99_s']:.2f} s"
    return (
        f"Simulated with the very router ({said['generate']}): the objective {word}: {said['goodput_share']:.1%} of "
        f"{said['requests']} requests within it; {times}; {said['tpot_p50_ms']:.0f} ms a token "
        f"(p99 {said['tpot_p99_ms']:.0f})."
    )
