"""OTel collector, Prometheus and Grafana beside a mesh, under the profile `obs`. Pure: their files come in as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from deploy.fleet.tls import Certificate
from deploy.render.tls import authority_mount

PROFILE = "obs"
METRICS_KEY = "metrics.key"  # an API key for Prometheus, where the mesh has keys
GATEWAY_CA = "/etc/prometheus/gateway-ca.crt"
IMAGES = {
    "otel-collector": "${COLLECTOR_IMAGE:-otel/opentelemetry-collector-contrib:0.138.0}",
    "prometheus": "${PROMETHEUS_IMAGE:-prom/prometheus:v3.7.3}",
    "grafana": "${GRAFANA_IMAGE:-grafana/grafana:12.2.1}",
}


def observability(
    shipped: Mapping[str, str], *, keys: bool, door: Certificate | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(services, files). `shipped`: the files below deploy/ by their path, e.g. otel/collector.yaml. `door`: the
    gateway's certificate."""
    files = dict(shipped)
    more: dict[str, Any] = {}
    if keys:
        more["authorization"] = {"credentials_file": f"/run/secrets/{METRICS_KEY}"}
    if door:
        more |= {"scheme": "https", "tls_config": {"ca_file": GATEWAY_CA, "server_name": door.name}}
    if more:
        scrape = yaml.safe_load(files["prometheus/prometheus.yaml"])
        for job in scrape["scrape_configs"]:
            if job["job_name"] == "gateway":
                job |= more
        files["prometheus/prometheus.yaml"] = yaml.safe_dump(scrape, sort_keys=False)
    collector = _service("otel-collector", ["./otel/collector.yaml:/etc/otelcol-contrib/config.yaml:ro"])
    prometheus = _service(
        "prometheus",
        [
            "./prometheus/prometheus.yaml:/etc/prometheus/prometheus.yml:ro",
            "./prometheus/alerts.yaml:/etc/prometheus/alerts.yaml:ro",
            "prometheus:/prometheus",
        ],
    )
    prometheus["ports"] = ["127.0.0.1:9090:9090"]
    if keys:
        prometheus["secrets"] = [METRICS_KEY]
    if door:
        prometheus["volumes"].append(authority_mount(door, GATEWAY_CA))
    grafana = _service(
        "grafana",
        [
            "./grafana/datasource.yaml:/etc/grafana/provisioning/datasources/infermesh.yaml:ro",
            "./grafana/provider.yaml:/etc/grafana/provisioning/dashboards/infermesh.yaml:ro",
            "./grafana/dashboard.json:/var/lib/grafana/dashboards/infermesh.json:ro",
            "grafana:/var/lib/grafana",
        ],
    )
    grafana["ports"] = ["127.0.0.1:3000:3000"]
    return {"otel-collector": collector, "prometheus": prometheus, "grafana": grafana}, files


def _service(name: str, volumes: list[str]) -> dict[str, Any]:
    return {
        "image": IMAGES[name],
        "profiles": [PROFILE],
        "volumes": volumes,
        "read_only": True,
        "tmpfs": ["/tmp:mode=1777"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
    }
