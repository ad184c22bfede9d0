"""What Prometheus has seen of the mesh: every query of the dashboard and every alert, against the real server."""

from __future__ import annotations

import json
import math
import urllib.parse
import urllib.request
from typing import Any

from docker import DockerClient

from deploy.render.dashboard import dashboard_text
from tests.container.checks import Lines

PROMETHEUS = "http://127.0.0.1:9090/api/v1"
WINDOW = "10m"  # all of the run
# Nothing of the kind happens in the run: no call is cut to move, no model has a fallback, no group is scaled.
MAY_BE_EMPTY = ("abandoned_total", "degrades_total", "gateway_replicas", "desired_replicas")


def watched(client: DockerClient, lines: Lines) -> None:
    targets = _get("targets")["activeTargets"]
    down = [f"{one['labels']['job']}: {one['lastError']}" for one in targets if one["health"] != "up"]
    lines.add("Prometheus scrapes the gateway, with a key", not down, ", ".join(down) or f"{len(targets)} targets up")
    queries = expressions()
    empty, wrong = [], []
    for query in queries:
        try:
            found = _get("query", query=query.replace("$__rate_interval", WINDOW))["result"]
        except (OSError, ValueError) as error:
            wrong.append(f"{query}: {error}")
            continue
        values = [float(one["value"][1]) for one in found]
        if not [value for value in values if not math.isnan(value)]:
            empty.append(query)
    surprising = [query for query in empty if not any(name in query for name in MAY_BE_EMPTY)]
    for query in [*wrong, *surprising]:
        print(f"        {query}")
    measured = f"{len(queries)} run, {len(wrong)} refused, {len(queries) - len(empty)} with data"
    lines.add("queries of the dashboard", not wrong and not surprising, measured)
    rules = [rule for group in _get("rules")["groups"] for rule in group["rules"]]
    ill = [f"{rule['name']}: {rule.get('lastError', rule['health'])}" for rule in rules if rule["health"] != "ok"]
    lines.add("alerts", bool(rules) and not ill, ", ".join(ill) or f"{len(rules)} evaluated")


def expressions() -> list[str]:
    panels = json.loads(dashboard_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def _get(path: str, **query: str) -> Any:
    """Raises ValueError for what Prometheus refuses."""
    url = f"{PROMETHEUS}/{path}?{urllib.parse.urlencode(query)}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=10) as reply:
            told = json.loads(reply.read())
    except urllib.error.HTTPError as error:
        raise ValueError(error.read().decode()[:500]) from None
    return told["data"]
