"""A fleet over TLS in containers: who gets which file, how it is asked, and that keys stay where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.fleet import FleetError
from deploy.render.compose import compose
from deploy.render.k8s import render_k8s
from deploy.render.shipped import shipped_files
from tests.kit.rendering import SITE, fleet_of, parsed

GATEWAY, INSTANCES = {"name": "mesh.example.com"}, {"name": "mesh.internal"}
INSTANCE = {"id": "i", "model": "m", "engine": "scripted"}


def project(**tls: Any) -> dict[str, Any]:
    """Its services, and `prometheus.yaml` under the name `scrape`."""
    made = compose(fleet_of(instances=[INSTANCE], tls=tls), SITE, shipped_files())
    scrape = yaml.safe_load(made.files["prometheus/prometheus.yaml"])["scrape_configs"][0]
    services: dict[str, Any] = yaml.safe_load(made.files["compose.yaml"])["services"]
    return {**services, "scrape": scrape}


def mounted(service: dict[str, Any]) -> dict[str, str]:
    binds = [mount for mount in service["volumes"] if isinstance(mount, dict)]
    assert all(one["read_only"] and not one["bind"]["create_host_path"] for one in binds)
    return {one["target"]: one["source"] for one in binds}


def pods(**tls: Any) -> dict[str, Any]:
    """name -> the pod's one container, with its volumes."""
    found = {}
    for text in render_k8s(fleet_of(instances=[INSTANCE], tls=tls), SITE).files.values():
        for item in yaml.safe_load_all(text):
            if item["kind"] == "Deployment":
                kubernetes_validate.validate(item, "1.32", strict=True)
                pod = item["spec"]["template"]["spec"]
                found[item["metadata"]["name"]] = {**pod["containers"][0], "volumes": pod["volumes"]}
    return found


def secrets(pod: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """Where it is mounted -> (Secret, its keys)."""
    at = {mount["name"]: mount["mountPath"] for mount in pod["volumeMounts"] if mount.get("readOnly")}
    told = {one["name"]: one["secret"] for one in pod["volumes"] if "secret" in one}
    return {at[name]: (one["secretName"], [key["key"] for key in one["items"]]) for name, one in told.items()}


def test_compose_mounts_folders_and_asks_by_name() -> None:
    made = project(gateway=GATEWAY, instances={**INSTANCES, "folder": "/etc/mesh/node/"})
    door = parsed(made["gateway"]["command"])
    assert (door.tls_cert_file, door.tls_key_file) == (
        Path("/run/tls/gateway/tls.crt"),
        Path("/run/tls/gateway/tls.key"),
    )
    assert (door.instances_ca_file, door.instances_tls_name) == (Path("/run/tls/instances/ca.crt"), "mesh.internal")
    one = parsed(made["i"]["command"])
    assert (one.tls_cert_file, one.tls_key_file) == (
        Path("/run/tls/instances/tls.crt"),
        Path("/run/tls/instances/tls.key"),
    )
    assert mounted(made["gateway"]) == {
        "/run/tls/gateway": "./tls/gateway",
        "/run/tls/instances/ca.crt": "/etc/mesh/node/ca.crt",
    }
    assert mounted(made["i"]) == {"/run/tls/instances": "/etc/mesh/node"}
    for name, port, folder, told in (("gateway", 50050, "gateway", GATEWAY), ("i", 50051, "instances", INSTANCES)):
        words = made[name]["healthcheck"]["test"]
        asked = parsed(words[2:])
        assert words[:2] == ["CMD", "infermesh"] and asked["address"] == f"grpcs://127.0.0.1:{port}"
        assert (asked["ca_file"], asked["tls_name"]) == (f"/run/tls/{folder}/ca.crt", told["name"])
    (ca,) = mounted(made["prometheus"])
    assert made["scrape"]["scheme"] == "https"
    assert made["scrape"]["tls_config"] == {"ca_file": ca, "server_name": "mesh.example.com"}


def test_kubernetes_mounts_secrets_and_the_gateway_has_no_key_of_the_instances() -> None:
    made = pods(gateway=GATEWAY, instances={**INSTANCES, "secret": "node-cert"})
    gateway, instance = made["infermesh-gateway"], made["i"]
    assert secrets(gateway)["/run/tls/gateway"] == ("infermesh-gateway-tls", ["tls.crt", "tls.key"])
    assert secrets(gateway)["/run/tls/instances"] == ("node-cert", ["ca.crt"])
    assert secrets(instance)["/run/tls/instances"] == ("node-cert", ["tls.crt", "tls.key", "ca.crt"])
    assert "/run/tls/gateway" not in secrets(instance)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert gateway[probe]["httpGet"]["scheme"] == "HTTPS"
    for probe in ("startupProbe", "readinessProbe"):  # the kubelet's own gRPC probe has no TLS
        words = instance[probe]["exec"]["command"]
        asked = parsed(words[1:])
        assert words[0] == "infermesh" and asked["address"] == "grpcs://127.0.0.1:50051"
        assert (asked["ca_file"], asked["tls_name"]) == ("/run/tls/instances/ca.crt", "mesh.internal")
    assert instance["livenessProbe"]["tcpSocket"] == {"port": 50051}
    assert parsed(gateway["args"]).instances_tls_name == "mesh.internal" and parsed(instance["args"]).tls_cert_file


def test_doors_alone_or_instances_alone() -> None:
    doors, inside = project(gateway=GATEWAY), project(instances=INSTANCES)
    assert parsed(doors["gateway"]["command"]).instances_ca_file is None and not mounted(doors["i"])
    assert doors["i"]["healthcheck"]["test"][-1] == "127.0.0.1:50051"
    assert parsed(inside["gateway"]["command"]).tls_cert_file is None
    assert inside["gateway"]["healthcheck"]["test"][-1] == "127.0.0.1:50050" and "scheme" not in inside["scrape"]
    assert list(mounted(inside["gateway"])) == ["/run/tls/instances/ca.crt"]
    assert "grpc" in pods(gateway=GATEWAY)["i"]["readinessProbe"]
    assert "scheme" not in pods(instances=INSTANCES)["infermesh-gateway"]["readinessProbe"]["httpGet"]


def test_a_certificate_is_for_a_name() -> None:
    with pytest.raises(FleetError) as caught:
        fleet_of(tls={"gateway": {"secret": "Not_A_Name"}, "instances": {"name": "a name", "ca_file": "x"}})
    told = {fault.path: fault.message for fault in caught.value.faults}
    assert told["tls.gateway.name"] == "is needed" and "tls.gateway.secret" in told and "tls.instances.name" in told
    assert "allowed: name, folder, secret" in told["tls.instances.ca_file"]


def test_where_they_are_wanted_is_said() -> None:
    fleet = fleet_of(instances=[INSTANCE], tls={"gateway": GATEWAY, "instances": INSTANCES})
    told = compose(fleet, SITE, shipped_files()).remarks
    assert "tls: ./tls/gateway wants tls.crt for mesh.example.com, tls.key and ca.crt, readable by uid 10001" in told
    told = render_k8s(fleet, SITE).remarks
    assert any("create secret generic infermesh-gateway-tls --type=kubernetes.io/tls --from-f" in line for line in told)
    assert [line.endswith("ca.crt") for line in told if line.startswith("tls:")] == [False, True]
