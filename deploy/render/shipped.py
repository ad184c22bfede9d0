"""The configuration files that come with the package, read once by whoever renders."""

from __future__ import annotations

from pathlib import Path

NAMES = (
    "otel/collector.yaml",
    "prometheus/prometheus.yaml",
    "prometheus/alerts.yaml",
    "grafana/datasource.yaml",
    "grafana/provider.yaml",
    "grafana/dashboard.json",
)


def shipped_files() -> dict[str, str]:
    """Path below deploy/ -> text."""
    deploy = Path(__file__).resolve().parents[1]
    return {name: (deploy / name).read_text(encoding="utf-8") for name in NAMES}
