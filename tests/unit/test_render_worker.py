"""Worker resources as a fleet: what each part becomes, and what has no counterpart."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from deploy.fleet import FleetError
from deploy.render.k8s import render_k8s
from deploy.render.worker import fleet_of_workers, has_workers, quantity
from tests.kit.rendering import EXAMPLES, SITE, parsed

API = "arcadia.kubeagi.k8s.com.cn/v1alpha1"
MODEL = {"apiVersion": API, "kind": "Model", "metadata": {"name": "q"}, "spec": {"huggingFaceRepo": "Qwen/Q"}}


def worker(**spec: Any) -> str:
    resource = {"apiVersion": API, "kind": "Worker", "metadata": {"name": "w", "labels": {"team": "rag"}}}
    told = {"type": "fastchat-vllm", "model": {"kind": "Model", "name": "q"}, **spec}
    return yaml.safe_dump_all([MODEL, {**resource, "spec": told}])


def faults(**spec: Any) -> list[str]:
    with pytest.raises(FleetError) as caught:
        fleet_of_workers(worker(**spec))
    return [str(fault) for fault in caught.value.faults]


def test_every_part_of_a_worker_has_its_place() -> None:
    fleet, _ = fleet_of_workers((EXAMPLES / "kubernetes" / "worker.yaml").read_text())
    vllm, adopted = fleet.instances
    assert (vllm.engine, vllm.tp, vllm.ray_cluster, vllm.labels) == ("vllm", 2, 0, {"team": "rag"})
    assert vllm.resources and (vllm.resources.cpus, vllm.resources.memory_gib, vllm.resources.gpus) == (16, 64, 2)
    assert vllm.storage and vllm.storage.size_gib == 200
    assert fleet.model("qwen-72b").source == "Qwen/Qwen-72B-Chat"
    assert (adopted.engine, adopted.url) == ("openai-http", "http://fastchat-api:8000")


def test_a_worker_renders_to_a_pod_that_parses() -> None:
    fleet, _ = fleet_of_workers((EXAMPLES / "kubernetes" / "worker.yaml").read_text())
    made = render_k8s(fleet, SITE)
    (stateful,) = [
        one for one in yaml.safe_load_all(made.files["qwen-72b-worker.yaml"]) if one["kind"] == "StatefulSet"
    ]
    pod = stateful["spec"]["template"]
    assert pod["metadata"]["labels"]["team"] == "rag" and pod["metadata"]["labels"]["infermesh.dev/ray-cluster"] == "0"
    assert parsed(pod["spec"]["containers"][0]["args"]).vllm.tp == 2
    assert stateful["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "200Gi"


def test_without_storage_the_models_are_in_an_empty_dir() -> None:
    fleet, _ = fleet_of_workers(worker())
    text = render_k8s(fleet, SITE).files["w.yaml"]
    volumes = next(one for one in yaml.safe_load_all(text) if one["kind"] == "Deployment")["spec"]["template"]["spec"][
        "volumes"
    ]
    assert {"name": "models", "emptyDir": {}} in volumes


def test_number_gpus_and_the_gpu_limit_say_the_same() -> None:
    fleet, _ = fleet_of_workers(
        worker(additionalEnvs=[{"name": "NUMBER_GPUS", "value": "4"}, {"name": "A", "value": "b"}])
    )
    (one,) = fleet.instances
    assert one.tp == 4 and one.resources and one.resources.gpus == 4 and one.environment == {"A": "b"}
    assert faults(
        resources={"limits": {"nvidia.com/gpu": "2"}}, additionalEnvs=[{"name": "NUMBER_GPUS", "value": "4"}]
    ) == ["document[1].spec.additionalEnvs: NUMBER_GPUS 4 and nvidia.com/gpu 2 contradict each other"]


def test_all_that_has_no_counterpart_is_told_at_once() -> None:
    told = faults(
        replicas=2,
        resources={"limits": {"cpu": "many", "amd.com/gpu": "1"}},
        storage={"selector": {}},
        additionalEnvs=[{"name": "NUMBER_GPUS", "value": "x"}, {"name": "K", "valueFrom": {}}],
    )
    assert {line.split(":")[0].removeprefix("document[1].spec.") for line in told} == {
        *("replicas", "resources.limits.cpu", "resources.limits.amd.com/gpu", "storage.selector"),
        *("storage.resources.requests.storage", "additionalEnvs[0].value", "additionalEnvs[1]"),
    }
    assert faults(type="tgi") == ["document[1].spec.type: 'tgi' is not among fastchat, fastchat-vllm"]
    assert "nothing says where the weights of z are" in faults(model={"name": "z"})[0]


def test_a_fleet_file_is_no_worker() -> None:
    assert has_workers(worker()) and not has_workers((EXAMPLES / "laptop.yaml").read_text()) and not has_workers("a: [")


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("16Gi", 16 * 2**30), ("2", 2), ("1.5G", 1.5e9), ("x", None)]
)
def test_quantities(text: str, number: float | None) -> None:
    assert quantity(text) == number
