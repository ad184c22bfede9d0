"""The dashboard and the autoscalers ask for what the gateway exports, under its own names."""

from __future__ import annotations

import re

from deploy.render.dashboard import TARGET, dashboard_text
from deploy.render.k8s import METRIC
from deploy.render.shipped import shipped_files
from infermesh.errors import Reason
from services.gateway.loop import HoldMeter
from services.gateway.observe import Observe


def exported() -> set[str]:
    observe = Observe()
    observe.metrics.watch_loop(HoldMeter())
    observe.metrics.watch_groups(list)
    kinds = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return {f"{one.name}{end}" for one in observe.metrics.registry.collect() for end in kinds[one.type]}


def test_every_metric_of_the_dashboard_is_exported() -> None:
    asked = set(re.findall(r"infermesh_gateway_\w+", dashboard_text()))
    assert len(asked) > 12 and asked <= exported()
    assert METRIC in exported()


def test_the_committed_dashboard_is_fresh() -> None:
    assert TARGET.read_text() == dashboard_text(), "run python -m deploy.render.dashboard"


def test_alerts_ask_for_what_is_exported_and_for_outcomes_that_there_are() -> None:
    text = shipped_files()["prometheus/alerts.yaml"]
    asked = set(re.findall(r"infermesh_gateway_\w+", text))
    assert len(asked) >= 4 and asked <= exported()
    outcomes = {word for told in re.findall(r'outcome=~"([^"]+)"', text) for word in told.split("|")}
    assert outcomes and outcomes <= {reason.value for reason in Reason}
