"""A fleet as Kubernetes objects: valid by the API's own schemas, and what is in them."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.fleet import FleetError
from deploy.render.k8s import render_k8s
from tests.kit.rendering import SITE, example, fleet_of, parsed

VERSION = "1.32"
OWN = ("Kustomization", "ScaledObject")  # of kustomize and KEDA, not of the API
SCRIPTED = {"model": "m", "engine": "scripted"}


def objects(fleet: Any, autoscaler: str = "hpa") -> list[dict[str, Any]]:
    made = render_k8s(fleet, SITE, autoscaler=autoscaler)
    found = [item for text in made.files.values() for item in yaml.safe_load_all(text)]
    for item in found:
        if item["kind"] not in OWN:
            kubernetes_validate.validate(item, VERSION, strict=True)
    return found


def of_kind(found: list[dict[str, Any]], *kinds: str) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item["spec"] for item in found if item["kind"] in kinds}


@pytest.mark.parametrize(
    "name", ["containers.yaml", "laptop.yaml", "scripted.yaml", "mixed-72b.yaml", "tiers.yaml", "tls.yaml"]
)
def test_examples_are_valid_and_every_command_line_is_taken(name: str) -> None:
    found = objects(example(name))
    workloads = of_kind(found, "Deployment", "StatefulSet")
    ours = [one for one in workloads.values() if "args" in one["template"]["spec"]["containers"][0]]
    for spec in ours:
        pod = spec["template"]["spec"]
        container = pod["containers"][0]
        if container["image"].startswith("infermesh-"):
            settings = parsed(container["args"])
            assert pod["terminationGracePeriodSeconds"] > settings.grace_s
        assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claimed = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
        assert mounted == {volume["name"] for volume in pod["volumes"]} | claimed
    assert set(of_kind(found, "PodDisruptionBudget")) == set(workloads) - {"infermesh-consul"}


def test_the_validator_would_say_so() -> None:
    item = next(one for one in objects(fleet_of(instances=[{"id": "i", **SCRIPTED}])) if one["kind"] == "Service")
    item["spec"]["portz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(item, VERSION, strict=True)


def test_like_instances_are_one_class_on_nodes_of_their_card() -> None:
    workloads = of_kind(objects(example("mixed-72b.yaml")), "Deployment")
    short, long = workloads["qwen2-5-72b-a800-80g"], workloads["qwen2-5-72b-long-context-h20-96g"]
    assert (short["replicas"], long["replicas"]) == (4, 2)
    pod = short["template"]["spec"]
    assert pod["nodeSelector"] == {"infermesh.dev/device": "A800-80G"}
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    settings = parsed(pod["containers"][0]["args"])
    assert (settings.instance_id, settings.advertise, settings.vllm.tp) == ("pod-0", "10.1.2.3:50051", 4)


@pytest.mark.parametrize(
    ("storage", "kind", "claims"),
    [
        (None, "Deployment", 0),
        ({"size_gib": 60}, "StatefulSet", 0),
        ({"size_gib": 60, "access_mode": "ReadOnlyMany", "storage_class": "fast"}, "Deployment", 1),
    ],
)
def test_storage_decides_the_workload(storage: dict[str, Any] | None, kind: str, claims: int) -> None:
    found = objects(fleet_of(instances=[{"id": "i", **SCRIPTED, "storage": storage}]))
    assert "i" in of_kind(found, kind)
    assert len(of_kind(found, "PersistentVolumeClaim")) == claims
    volumes = of_kind(found, kind)["i"]["template"]["spec"]["volumes"]
    assert ({"name": "models", "emptyDir": {}} in volumes) == (storage is None)


def test_min_and_max_scale_by_what_the_gateways_say_of_their_group() -> None:
    fleet = fleet_of(instances=[{"id": "i", **SCRIPTED, "min": 2, "max": 5}, {"id": "j", **SCRIPTED, "weight": 2}])
    found = objects(fleet)
    (hpa,) = of_kind(found, "HorizontalPodAutoscaler").values()
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (2, 5)
    metric = {"name": "infermesh_gateway_desired_replicas", "selector": {"matchLabels": {"group": "i"}}}
    assert hpa["metrics"][0]["external"]["metric"] == metric
    workloads = of_kind(found, "Deployment")
    assert "replicas" not in workloads["i"]
    said = {name: parsed(workloads[name]["template"]["spec"]["containers"][0]["args"]) for name in ("i", "j")}
    assert (said["i"].group, said["j"].group) == ("i", "")
    gateway = parsed(workloads["infermesh-gateway"]["template"]["spec"]["containers"][0]["args"])
    assert {name: (one.least, one.most) for name, one in gateway.routing.scale.items()} == {"i": (2, 5)}
    (keda,) = of_kind(objects(fleet, "keda"), "ScaledObject").values()
    (trigger,) = keda["triggers"]
    assert trigger["metadata"]["query"] == 'max(infermesh_gateway_desired_replicas{group="i"})'
    assert (trigger["metadata"]["threshold"], trigger["metadata"]["ignoreNullValues"]) == ("1", "false")
    assert of_kind(objects(fleet, "none"), "Deployment")["i"]["replicas"] == 2


def test_what_cannot_be_in_a_pod_is_told_at_once() -> None:
    fleet = fleet_of(
        models=[{"id": "m", "kind": "llm", "source": "/data/m"}],
        instances=[
            {
                "id": "i",
                "model": "m",
                "labels": {"a b": "c", "app.kubernetes.io/name": "x"},
                "telemetry": {},
            },
            {"id": "j", "model": "m", "engine": "openai-http", "url": "http://127.0.0.1:8001"},
        ],
    )
    with pytest.raises(FleetError) as caught:
        render_k8s(fleet, SITE)
    assert {fault.path for fault in caught.value.faults} == {
        *("instances[1].url", "models[0].source", "instances[0].labels.a b"),
        "instances[0].telemetry",
        "instances[0].labels.app.kubernetes.io/name",
    }


def test_cards_that_instances_share_are_remarked() -> None:
    told = render_k8s(example("containers.yaml"), SITE).remarks
    assert any(line.startswith("gpu-1: has 2 cards and its instances ask for 3") for line in told)
    assert not any("ask for" in line for line in render_k8s(example("mixed-72b.yaml"), SITE).remarks)
