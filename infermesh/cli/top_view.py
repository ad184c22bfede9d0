"""What `infermesh top` shows, from the listings of two moments. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group as Parts
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from infermesh.v1.mesh_pb2 import Group, Instance

COLOURS = {"healthy": "green", "rejected": "red", "lost": "red", "ejected": "red", "banned": "red"}
SORTS = ("id", "state", "running", "kv")
BAR = 12
WIDE = 110  # columns; on fewer the addresses are left out, and the bars are half as long


@dataclass(frozen=True, slots=True)
class Row:
    """One instance. None = nobody told. `steps_s`: engine steps a second since the listing before."""

    id: str
    kind: str
    model: str
    state: str
    device: str
    running: int | None
    waiting: int | None
    kv: float | None
    in_flight: int
    steps_s: float | None
    why: str
    address: str


def rows(now: Sequence[Instance], before: Sequence[Instance], seconds: float) -> list[Row]:
    """`before`: the listing `seconds` ago; empty = there was none."""
    steps = {(one.id, one.incarnation): one.load.steps for one in before if one.load.HasField("steps")}
    found = []
    for one in now:
        load, meta = one.load, one.metadata
        old = steps.get((one.id, one.incarnation))
        ran = None
        if old is not None and load.HasField("steps") and seconds > 0:
            ran = max(0.0, (load.steps - old) / seconds)
        count = int(meta.get("device_count", "1") or 1)
        device = meta.get("device", "")
        found.append(
            Row(
                id=one.id,
                kind=one.kind,
                model=one.model,
                state=one.state,
                device=f"{count} × {device}" if count > 1 and device else device,
                running=load.running if load.HasField("running") else None,
                waiting=load.waiting if load.HasField("waiting") else None,
                kv=load.kv_used_ratio if load.HasField("kv_used_ratio") else None,
                in_flight=one.in_flight,
                steps_s=ran,
                why=one.rejected_reason,
                address=one.address,
            )
        )
    return found


def ordered(found: Sequence[Row], sort: str) -> list[Row]:
    """By id; or the unwell, the busiest, the fullest first."""
    keys: dict[str, Any] = {
        "id": lambda row: row.id,
        "state": lambda row: (row.state == "healthy", row.state, row.id),
        "running": lambda row: (-(row.running or 0), row.id),
        "kv": lambda row: (-(row.kv or 0.0), row.id),
    }
    return sorted(found, key=keys[sort])


def screen(found: Sequence[Row], sort: str, note: str, width: int, height: int, groups: Sequence[Group] = ()) -> Parts:
    """`note` is said above; `width` columns and `height` lines there are. `groups`: those that are scaled."""
    healthy = sum(row.state == "healthy" for row in found)
    busy = f"{_sum(found, 'running')} running · {_sum(found, 'waiting')} waiting"
    parts: list[Any] = [
        Text.assemble(
            ("infermesh", "bold"),
            f"  {healthy} of {len(found)} healthy · {busy}",
            (f"  {note}" if note else "", "yellow"),
        ),
        _models(found),
    ]
    if groups:
        parts.append(_groups(groups, width >= WIDE))
    room = max(3, height - 8 - len({(row.kind, row.model) for row in found}) - (len(groups) + 1 if groups else 0))
    shown = ordered(found, sort)
    parts.append(_instances(shown[:room], width >= WIDE))
    if len(shown) > room:
        parts.append(Text(f"and {len(shown) - room} more; a taller terminal, --kind or --sort shows them", "dim"))
    parts += [Text(f"{row.id}: {row.why}", "red") for row in shown[:room] if row.why]
    return Parts(*parts)


def _sum(found: Sequence[Row], name: str) -> int:
    return sum(getattr(row, name) or 0 for row in found)


def _models(found: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    for name in ("MODEL", "KIND"):
        table.add_column(name, overflow="fold")
    for name in ("UP", "RUN", "WAIT"):
        table.add_column(name, justify="right")
    for kind, model in sorted({(row.kind, row.model) for row in found if row.model}):
        own = [row for row in found if (row.kind, row.model) == (kind, model)]
        up = sum(row.state == "healthy" for row in own)
        colour = "green" if up == len(own) else "yellow" if up else "red"
        counts = (str(_sum(own, "running")), str(_sum(own, "waiting")))
        table.add_row(model, kind, Text(f"{up}/{len(own)}", colour), *counts)
    return table


def _groups(groups: Sequence[Group], wide: bool) -> Table:
    """How many replicas there are and should be; a group that is short of some stands out."""
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    table.add_column("GROUP", overflow="fold")
    for name in ("HERE", "WANTED", "MIN-MAX"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("USE", no_wrap=True)
    if wide:
        table.add_column("WHY", no_wrap=True, overflow="ellipsis")
    for one in groups:
        as_wanted = one.replicas == one.desired
        wanted = Text(str(one.desired), "green" if as_wanted else "yellow") if one.desired else Text("-")
        table.add_row(
            one.name,
            str(one.replicas),
            wanted,
            f"{one.least}-{one.most}",
            f"{one.use:.0%} {one.short}" if one.short else "-",
            *((one.why,) if wide else ()),
        )
    return table


def _instances(found: Sequence[Row], wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    for name in ("INSTANCE", "STATE", "DEVICE"):
        table.add_column(name, no_wrap=True)
    for name in ("RUN", "WAIT", "OURS", "STEPS/S"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("KV", no_wrap=True)
    if wide:
        table.add_column("ADDRESS", no_wrap=True)
    for row in found:
        table.add_row(
            row.id,
            Text(row.state, COLOURS.get(row.state, "yellow")),
            row.device,
            _number(row.running),
            _number(row.waiting),
            str(row.in_flight),
            "-" if row.steps_s is None else f"{row.steps_s:.1f}",
            meter(row.kv, BAR if wide else BAR // 2),
            *((row.address,) if wide else ()),
        )
    return table


def meter(ratio: float | None, length: int = BAR) -> Text:
    """A bar with its percentage."""
    if ratio is None:
        return Text("-")
    full = round(min(1.0, max(0.0, ratio)) * length)
    colour = "red" if ratio > 0.95 else "yellow" if ratio > 0.8 else "green"
    return Text.assemble(("█" * full, colour), ("░" * (length - full), "dim"), f" {ratio:4.0%}")


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
