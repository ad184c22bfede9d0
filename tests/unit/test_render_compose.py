"""A fleet as a Compose project: what is in it, whether its command lines are taken, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from deploy.fleet import FleetError
from deploy.render.compose import compose
from deploy.render.shipped import shipped_files
from tests.kit.rendering import SITE, example, fleet_of, parsed

OURS = ("gateway", "llm-1", "embedding-1", "rerank-1")
GPU_HOST = {"name": "n", "device": "L40S", "count": 2}


def project(fleet: Any, node: str = "") -> dict[str, Any]:
    made = compose(fleet, SITE, shipped_files(), node=node)
    loaded = yaml.safe_load(made.files["compose.yaml"])
    assert isinstance(loaded, dict)
    return loaded


def faults(**parts: Any) -> list[str]:
    with pytest.raises(FleetError) as caught:
        compose(fleet_of(**parts), SITE, shipped_files())
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize("name", ["containers.yaml", "laptop.yaml", "scripted.yaml", "tls.yaml"])
def test_every_command_line_is_taken_by_the_verb_that_it_names(name: str) -> None:
    services = project(example(name))["services"]
    commands = {key: one["command"] for key, one in services.items() if one["image"].startswith("infermesh-")}
    assert len(commands) == len(example(name).instances) + 1
    for key, command in commands.items():
        settings = parsed([word.replace("$$", "$") for word in command])
        if command[0] != "gateway":
            assert settings.instance_id == key and settings.advertise == f"{key}:50051"


def test_every_service_is_confined_and_stops_after_its_drain() -> None:
    services = project(example("containers.yaml"))["services"]
    for one in services.values():
        assert one["read_only"] and one["cap_drop"] == ["ALL"] and one["restart"] == "unless-stopped"
    for name in OURS:
        one, command = services[name], services[name]["command"]
        assert one["user"] == "10001:10001"
        assert float(one["stop_grace_period"].rstrip("s")) > float(command[command.index("--grace-s") + 1])
        port = "50050" if name == "gateway" else "50051"
        assert one["healthcheck"]["test"] == ["CMD", "infermesh", "health", f"127.0.0.1:{port}"]
        assert one["depends_on"] == {"consul": {"condition": "service_healthy"}}
    watching = {name for name, one in services.items() if one.get("profiles") == ["obs"]}
    assert watching == {"otel-collector", "prometheus", "grafana"}


def test_a_card_is_given_by_its_index_and_counted_from_zero_inside() -> None:
    one = project(example("containers.yaml"))["services"]["embedding-1"]
    assert one["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "device_ids": ["1"], "capabilities": ["gpu"]}
    ]
    assert one["command"][one["command"].index("--devices") + 1] == "cuda:0"


def test_everything_that_is_mounted_is_declared_or_rendered() -> None:
    made = compose(example("containers.yaml"), SITE, shipped_files())
    document = yaml.safe_load(made.files["compose.yaml"])
    assert "version" not in document and document["name"] == "infermesh"
    for service in document["services"].values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert source.startswith("/") or source.removeprefix("./") in {*made.files, *document["volumes"]}
        assert set(service.get("secrets", ())) <= set(document["secrets"])


def test_a_prompt_template_becomes_a_file_of_its_container() -> None:
    template = {"sys": "Now: {}", "user": "U: {}", "ai": "A: {}"}
    model = {"id": "m", "kind": "llm", "source": "org/m", "prompt_template": template}
    made = compose(fleet_of(models=[model], instances=[{"id": "i", "model": "m"}]), SITE, shipped_files())
    service = yaml.safe_load(made.files["compose.yaml"])["services"]["i"]
    inside = service["command"][service["command"].index("--prompt-template") + 1]
    (mount,) = [volume for volume in service["volumes"] if inside in volume]
    assert yaml.safe_load(made.files[mount.split(":")[0].removeprefix("./")])["sys"] == "Now: {}"


def test_prometheus_shows_a_key_only_where_the_mesh_has_keys() -> None:
    instances = [{"id": "i", "model": "m", "engine": "scripted"}]
    for insecure in (True, False):
        made = compose(fleet_of(instances=instances, gateway={"insecure": insecure}), SITE, shipped_files())
        scrape = yaml.safe_load(made.files["prometheus/prometheus.yaml"])["scrape_configs"][0]
        command = yaml.safe_load(made.files["compose.yaml"])["services"]["i"]["command"]
        assert ("authorization" in scrape) == (not insecure) == ("--keys" in command) == ("--insecure" not in command)


def test_several_hosts_are_a_project_each_and_dial_each_other() -> None:
    nodes = [{"name": name, "address": f"10.0.0.{n}"} for n, name in enumerate(("a", "b"), 1)]
    instances = [
        {"id": f"{node['name']}-1", "model": "m", "node": node["name"], "engine": "scripted"} for node in nodes
    ]
    parts = {"nodes": nodes, "instances": instances, "gateway": {"insecure": True}}
    services = project(fleet_of(**parts, registry="consul://10.0.0.9:8500"), node="b")["services"]
    assert "consul" not in services and "a-1" not in services
    assert services["b-1"]["ports"] == ["50061:50051"]
    assert parsed(services["b-1"]["command"]).advertise == "10.0.0.2:50061"
    told = faults(**parts)
    assert told == [
        "nodes: a Compose project is for one host; say which: --node a | b",
        "registry: several hosts need a Consul that all of them reach: consul://HOST:8500",
    ]


def test_all_that_is_wrong_is_told_at_once() -> None:
    told = faults(
        models=[
            {"id": "m", "kind": "llm", "source": "./here"},
            {"id": "far", "kind": "llm", "source": "http://localhost:1"},
        ],
        nodes=[GPU_HOST],
        instances=[
            {"id": "gateway", "model": "m", "node": "n", "cards": [0, 1], "tp": 2, "resources": {"gpus": 1}},
            {"id": "A.b", "model": "m", "node": "n", "cards": [0], "min": 1, "max": 3},
            {"id": "a-b", "model": "far", "engine": "openai-http"},
        ],
    )
    assert [line.split(":")[0] for line in told] == [
        *("instances[1].min", "instances[1].max"),
        *("instances[0].id", "instances[0].resources.gpus", "instances[2].id", "instances[2].url", "models[0].source"),
    ]
    assert any("a container needs /an/absolute/path" in line for line in told)


def test_what_a_container_does_not_take_is_remarked() -> None:
    instance = {"id": "i", "model": "m", "engine": "scripted", "python": "/usr/bin/python3", "storage": {"size_gib": 5}}
    told = compose(fleet_of(instances=[instance]), SITE, shipped_files()).remarks
    for part in (
        "instances[0].python: is for `up`",
        "Docker does not enforce size_gib",
        "keys.yaml, metrics.key, operator.key",
    ):
        assert any(part in line for line in told), part


def test_two_secrets_of_one_file_name_are_refused() -> None:
    adopted = {"model": "m", "engine": "openai-http", "url": "http://far:8000"}
    instances = [{"id": name, **adopted, "api_key_file": f"{name}/api.key"} for name in ("a", "b")]
    assert faults(instances=instances) == [
        "instances[1].api_key_file: b/api.key and a/api.key have one file name; give them two"
    ]
    one = project(fleet_of(instances=instances[:1]))
    assert one["services"]["a"]["secrets"] == ["keys.yaml", "operator.key", "api.key"]
    assert one["secrets"]["api.key"] == {"file": "./secrets/api.key"}


def test_a_registry_outside_needs_an_address_to_dial() -> None:
    parts = {"instances": [{"id": "i", "model": "m", "engine": "scripted"}], "registry": "consul://10.0.0.5:8500"}
    assert [line.split(":")[0] for line in faults(**parts)] == ["nodes"]
    assert [line.split(":")[0] for line in faults(**parts, nodes=[{"name": "n"}])] == ["nodes[0].address"]


def test_the_examples_that_wait_for_a_feature_say_which() -> None:
    with pytest.raises(FleetError, match=r"models\[0\]\.lora: not served yet"):
        compose(example("data-centre.yaml"), SITE, shipped_files(), node="a800-1")
