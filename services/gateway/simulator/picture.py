"""TTFT and goodput against load, one line a policy, as SVG. Pure: text in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any
from xml.sax.saxutils import escape

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#8C564B")
WIDTH, HEIGHT = 460, 320
LEFT, TOP, RIGHT, BOTTOM = 62, 40, 14, 46

Line = Sequence[tuple[float, float]]


def picture(title: str, axis: str, points: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]) -> str:
    """`points`: policy -> (load or rate, summary) in rising order."""
    ttft = {
        name: [(x, float(said["ttft_mean_s"])) for x, said in line if said["ttft_mean_s"]]
        for name, line in points.items()
    }
    good = {name: [(x, 100 * float(said["goodput_share"])) for x, said in line] for name, line in points.items()}
    names = list(points)
    rows = ceil(len(names) / 4)
    height = HEIGHT + 30 + 18 * rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{height}" '
        f'viewBox="0 0 {2 * WIDTH} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{WIDTH}" y="18" text-anchor="middle" font-size="14">{escape(title)}</text>',
        *_panel(0, "mean TTFT, s", axis, ttft, logarithmic=True),
        *_panel(WIDTH, "requests that met the objective, %", axis, good, logarithmic=False),
    ]
    for number, name in enumerate(names):
        x = LEFT + (number % 4) * (2 * WIDTH - LEFT) / 4
        y = HEIGHT + 24 + 18 * (number // 4)
        parts.append(f'<line x1="{x:.0f}" y1="{y - 4}" x2="{x + 22:.0f}" y2="{y - 4}" {_stroke(number)}/>')
        parts.append(f'<text x="{x + 28:.0f}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _stroke(number: int) -> str:
    dashes = ' stroke-dasharray="5 3"' if number else ""  # the first one, ours as a rule, is drawn solid
    return f'fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"{dashes}'


def _panel(left: float, label: str, axis: str, lines: Mapping[str, Line], *, logarithmic: bool) -> list[str]:
    xs = sorted({x for line in lines.values() for x, _ in line}) or [0.0]
    ys = [y for line in lines.values() for _, y in line] or [1.0]
    ticks = _decades(min(ys), max(ys)) if logarithmic else [0.0, 25.0, 50.0, 75.0, 100.0]
    x0, x1 = left + LEFT, left + WIDTH - RIGHT
    y0, y1 = HEIGHT - BOTTOM, TOP

    def across(x: float) -> float:
        return x0 + (x1 - x0) * ((x - xs[0]) / (xs[-1] - xs[0]) if xs[-1] > xs[0] else 0.5)

    def up(y: float) -> float:
        low, high, at = ticks[0], ticks[-1], y
        if logarithmic:
            low, high, at = log10(low), log10(high), log10(max(y, ticks[0]))
        return y0 + (y1 - y0) * (at - low) / (high - low)

    middle = (y0 + y1) / 2
    parts = [
        f'<text x="{(x0 + x1) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(axis)}</text>',
        f'<text transform="translate({left + 16:.0f} {middle:.0f}) rotate(-90)" text-anchor="middle">{label}</text>',
    ]
    for tick in ticks:
        y = up(tick)
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x1}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in xs:
        parts.append(f'<line x1="{across(x):.1f}" y1="{y0}" x2="{across(x):.1f}" y2="{y0 + 4}" stroke="black"/>')
        parts.append(f'<text x="{across(x):.1f}" y="{y0 + 17}" text-anchor="middle">{x:.3g}</text>')
    parts.append(f'<path d="M{x0} {y1} V{y0} H{x1}" fill="none" stroke="black"/>')
    for number, line in enumerate(lines.values()):
        dots = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{dots}" {_stroke(number)}/>')
        colour = COLOURS[number % len(COLOURS)]
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>' for x, y in line]
    return parts


def _decades(low: float, high: float) -> list[float]:
    """1, 10, 100 … around the values; 1, 2, 5 where they span less than two decades."""
    low = max(low, 1e-4)
    first, last = floor(log10(low)), ceil(log10(max(high, low * 1.01)))
    if last - first > 2:
        return [10.0**power for power in range(first, last + 1)]
    steps = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    below = max((step for step in steps if step <= low), default=steps[0])
    above = min((step for step in steps if step >= high), default=steps[-1])
    return [step for step in steps if below <= step <= above] if above > below else [below, below * 10]
