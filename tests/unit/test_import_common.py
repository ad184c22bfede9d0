"""configs/common.json as a fleet: what each key becomes, and what is told of the rest."""

from __future__ import annotations

import json
from typing import Any

import yaml

from deploy.fleet import Fleet, parse_fleet, unserved
from deploy.launch.commands import start_faults
from deploy.render.common_config import import_common
from infermesh.cli import main
from tests.kit.rendering import EXAMPLES

COMMON = EXAMPLES / "import" / "common.json"


def imported(raw: dict[str, Any]) -> Fleet:
    found = import_common(raw)
    assert found.faults == []
    return parse_fleet(yaml.safe_dump(found.document))


def paths(raw: Any) -> list[str]:
    return [fault.path for fault in import_common(raw).faults]


def test_two_cards_times_two_replicas_are_four_workers_behind_one_address() -> None:
    told = {"model_path": "/opt/bge-reranker-large", "device": ["cuda:2", "cuda:3"], "replica": 2}
    (one,) = imported({"rerank_model": {"bge": told}}).instances
    assert (one.cards, one.replicas) == ((2, 3), 2)


def test_replicas_of_an_llm_are_instances_of_their_own_cards() -> None:
    first, second = (one for one in imported(json.loads(COMMON.read_text())).instances if one.engine == "vllm")
    assert (first.cards, first.tp, second.cards, second.id) == ((0,), 1, (1,), "vicuna-13b-1")
    whole = {"model_path": "/m", "device": ["cuda:6", "cuda:7"], "vram_ratio": 0.8}
    (one,) = imported({"language_model": {"m": whole}}).instances
    assert (one.tp, one.cards, one.vram_ratio) == (2, (6, 7), 0.8)


def test_the_example_is_a_fleet_that_up_would_start() -> None:
    fleet = imported(json.loads(COMMON.read_text()))
    assert unserved(fleet) == [] and list(start_faults(fleet)) == []
    assert fleet.nodes[0].count == 4
    template = fleet.model("vicuna-13b").prompt_template
    assert template and template.sep == "</s>"
    remarks = import_common(json.loads(COMMON.read_text())).remarks
    assert [line.partition(":")[0] for line in remarks] == ["telemetry", "bge"]


def test_the_ids_that_callers_are_told_are_those_of_the_one_llm() -> None:
    raw = {"language_model": {"m": {"model_path": "/m"}}, "telemetry": {"enable": True, "instance_id": "gpu-1"}}
    (one,) = imported(raw).instances
    assert one.telemetry and one.telemetry.instance_id == "gpu-1" and one.telemetry.enable
    (one,) = imported({**raw, "telemetry": {"enable": False}}).instances
    assert one.telemetry and not one.telemetry.enable
    assert paths({**raw, "telemetry": {"on": 1}}) == ["telemetry"]


def test_every_key_without_a_counterpart_is_told_at_once() -> None:
    assert paths(
        {
            "mdid_model": {},
            "language_model": {"m": {"device": ["cuda:0"], "tensor_parallel_size": 2, "beam": 4}},
            "embedding_model": {"e": {"model_path": "/e", "device": "gpu", "replica": 0, "vram_ratio": 0.5}},
            "rerank_model": [],
        }
    ) == [
        "mdid_model",
        *("language_model.m.beam", "language_model.m.model_path", "language_model.m.device"),
        *("embedding_model.e.vram_ratio", "embedding_model.e.device", "embedding_model.e.replica"),
        "rerank_model",
    ]
    assert paths([]) == ["file"] and paths({}) == ["file"]


def test_the_verb_writes_the_file_or_says_what_is_wrong(tmp_path: Any, capsys: Any) -> None:
    target = tmp_path / "fleet.yaml"
    assert main(["import", str(COMMON), "-o", str(target)]) == 0
    assert len(parse_fleet(target.read_text()).instances) == 4
    assert main(["import", str(EXAMPLES / "kubernetes" / "worker.yaml")]) == 0
    assert "ray_cluster: 0" in capsys.readouterr().out
    (tmp_path / "bad.json").write_text('{"mdid_model": {}}')
    assert main(["import", str(tmp_path / "bad.json")]) == 2
    assert "mdid_model: has no counterpart" in capsys.readouterr().err
