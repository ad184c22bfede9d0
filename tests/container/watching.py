"""What Prometheus has seen of the mesh: every query of the dashboard and every alert, against the real server."""

from __future__ import annotations

from tests.container.checks import Lines
from tests.kit.prometheus import Prometheus, expressions

WINDOW = "10m"  # all of the run
# Nothing of the kind happens in the run: no call is cut to move, no model has a fallback, no group is scaled, and
# without a collector no span is lost.
MAY_BE_EMPTY = ("abandoned_total", "degrades_total", "gateway_replicas", "desired_replicas", "spans_dropped")


def watched(lines: Lines) -> None:
    prometheus = Prometheus("http://127.0.0.1:9090")
    down = prometheus.down()
    lines.add("Prometheus scrapes the gateway, with a key", not down, ", ".join(down) or "up")
    asked, empty = len(expressions()), prometheus.without_data(WINDOW)
    surprising = [query for query in empty if not any(name in query for name in MAY_BE_EMPTY)]
    for query in surprising:
        print(f"        {query}")
    measured = f"{asked} run, {asked - len(empty)} with data, {len(empty)} of what did not happen"
    lines.add("queries of the dashboard", not surprising, measured)
    rules = prometheus.rules()
    ill = [f"{name}: {health}" for name, health in rules.items() if health != "ok"]
    lines.add("alerts", bool(rules) and not ill, ", ".join(ill) or f"{len(rules)} evaluated")
