"""The Grafana dashboard, as Python makes it: `python -m deploy.render.dashboard` writes deploy/grafana/dashboard.json.

Its metrics are held against what the gateway exports by tests/unit/test_render_dashboard.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "grafana" / "dashboard.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 24  # of Grafana's grid


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph. `lines`: (PromQL, legend). `unit` is Grafana's name for it."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]


def _quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    grouped, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    rate = f"sum by ({grouped}) (rate({metric}_bucket[$__rate_interval]))"
    return tuple((f"histogram_quantile({q / 100:g}, {rate})", f"p{q}{legend}") for q in (50, 95, 99))


def _rate(metric: str, by: str) -> tuple[tuple[str, str], ...]:
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return ((f"sum by ({by}) (rate({metric}[$__rate_interval]))", legend),)


def _prefix(type: str) -> str:
    return f'sum by (model) (rate({GATEWAY}_prefix_tokens_total{{type="{type}"}}[$__rate_interval]))'


GATEWAY = "infermesh_gateway"
PANELS = (
    Panel("Requests", "reqps", _rate(f"{GATEWAY}_requests_total", "model, outcome")),
    Panel(
        "In flight and waiting",
        "short",
        (
            (f"sum({GATEWAY}_in_flight)", "in flight"),
            (f"sum({GATEWAY}_waiting)", "waiting"),
        ),
    ),
    Panel("Objective", "reqps", _rate(f"{GATEWAY}_objective_total", "model, verdict")),
    Panel("Time to first token", "s", _quantiles(f"{GATEWAY}_ttft_seconds", "model")),
    Panel("Whole requests", "s", _quantiles(f"{GATEWAY}_duration_seconds", "model")),
    Panel("Tokens", "short", _rate(f"{GATEWAY}_tokens_total", "model, type")),
    Panel("Time per token", "s", _quantiles(f"{GATEWAY}_time_per_token_seconds", "model")),
    Panel("Waited for room", "s", _quantiles(f"{GATEWAY}_waited_seconds", "model")),
    Panel(
        "Time to first token: measured ÷ predicted", "short", _quantiles(f"{GATEWAY}_ttft_prediction_ratio", "model")
    ),
    Panel(
        "Part of the prompts in the cache: found, and predicted",
        "percentunit",
        tuple((f"{_prefix(type)} / {_prefix('prompt')}", f"{type} {{{{model}}}}") for type in ("found", "predicted")),
    ),
    Panel("Requests by instance", "reqps", _rate(f"{GATEWAY}_requests_total", "instance")),
    Panel("Refused", "reqps", _rate(f"{GATEWAY}_refused_total", "method, outcome")),
    Panel("Retries", "reqps", _rate(f"{GATEWAY}_retries_total", "reason")),
    Panel("Served by another model", "reqps", _rate(f"{GATEWAY}_degrades_total", "model, served")),
    Panel("Streams that went on elsewhere", "reqps", _rate(f"{GATEWAY}_resumes_total", "reason, exact")),
    Panel("Pause of such a stream", "s", _quantiles(f"{GATEWAY}_resume_pause_seconds")),
    Panel(
        "Instances taken out, calls cut to move",
        "short",
        (
            *_rate(f"{GATEWAY}_ejections_total", "instance, cause"),
            *_rate(f"{GATEWAY}_abandoned_total", "instance"),
        ),
    ),
    Panel(
        "Instances by group: there are, there should be",
        "short",
        (
            (f"max by (group) ({GATEWAY}_replicas)", "{{group}}"),
            (f"max by (group) ({GATEWAY}_desired_replicas)", "{{group}} wanted"),
        ),
    ),
    Panel(
        "Spans that no collector took",
        "short",
        ((f"sum(rate({GATEWAY}_spans_dropped_total[$__rate_interval]))", ""),),
    ),
    Panel(
        "Longest turn of the event loop",
        "s",
        (
            (f"max({GATEWAY}_loop_hold_seconds)", "lately"),
            (f"max({GATEWAY}_loop_hold_max_seconds)", "since start"),
            (f"max({GATEWAY}_loop_hold_max_wall_seconds)", "since start, with what the machine took"),
        ),
    ),
)


def dashboard_text() -> str:
    """The dashboard's JSON, as it is committed."""
    document = {
        "uid": "infermesh",
        "title": "infermesh",
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }
    return json.dumps(document, indent=1) + "\n"


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, COLUMNS // WIDTH)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for place, (expression, legend) in enumerate(panel.lines)
        ],
    }


if __name__ == "__main__":
    TARGET.write_text(dashboard_text(), encoding="utf-8")
