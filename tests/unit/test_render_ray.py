"""A fleet for Ray: lines that `ray start` takes, command lines that our verbs take, a fleet file that `up` takes."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.fleet import FleetError, parse_fleet
from deploy.launch.on_ray.service import ADDRESS, FOLDER
from deploy.render.ray import render_ray
from tests.kit.rendering import SITE, example, fleet_of, parsed


def started(text: str) -> dict[str, list[str]]:
    """Kind of host -> its `ray start` line."""
    lines = [line for line in text.splitlines() if line.endswith(";;") and ") ray start" in line]
    return {line.partition(")")[0]: shlex.split(line.partition(")")[2].removesuffix(";;")) for line in lines}


def placements(name: str = "ray.yaml") -> list[dict[str, Any]]:
    loaded = yaml.safe_load(render_ray(example(name), SITE).files["placements.yaml"])
    assert isinstance(loaded, list)
    return loaded


def test_every_line_is_taken_by_ray() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    lines = started(render_ray(example("ray.yaml"), SITE).files["start.sh"])
    assert list(lines) == ["head", "a800", "h20"]
    for words in lines.values():
        assert words[:2] == ["ray", "start"]
        scripts.start.make_context("start", words[2:])
    told = scripts.start.make_context("start", lines["a800"][2:]).params
    assert (told["address"], told["num_gpus"], told["num_cpus"]) == ("10.0.0.5:6379", 8, 128)
    assert told["resources"] == '{"device:A800-80G": 8}'


def test_the_script_says_how_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "start.sh").write_text(render_ray(example("ray.yaml"), SITE).files["start.sh"])
    done = subprocess.run(["sh", "start.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: sh start.sh head | a800 | h20\n")


def test_every_command_line_is_taken_by_the_verb_that_it_names() -> None:
    found = placements()
    assert [one["instance"] for one in found] == ["chat", "wide", "embed"]
    for one in found:
        words = [word.replace(ADDRESS, "10.0.0.9").replace(FOLDER, "/tmp/x") for word in one["command"]]
        assert words[1:4] == ["-P", "-m", "infermesh.cli"]
        settings = parsed(words[4:])
        assert settings.instance_id == one["instance"] and settings.listen == "10.0.0.9:0"


def test_what_is_placed_where() -> None:
    chat, wide, embed = placements()
    assert chat["bundles"] == [
        {"host": 0, "GPU": 4, "device:A800-80G": 4, "CPU": 8.0, "memory": 64 << 30},
    ]
    assert (chat["strategy"], chat["replicas"], wide["strategy"], wide["hosts"]) == ("STRICT_PACK", [1, 4], "PACK", 2)
    assert [bundle["host"] for bundle in wide["bundles"]] == [0] + [0] * 8 + [1] * 8
    assert 'distributed_executor_backend="ray"' in wide["command"] and embed["bundles"][0]["GPU"] == 1


def test_the_completed_fleet_reads_as_the_same() -> None:
    fleet = example("ray.yaml")
    assert parse_fleet(render_ray(fleet, SITE).files["fleet.yaml"]) == fleet


def test_without_clusters_the_head_is_asked_for() -> None:
    made = render_ray(fleet_of(instances=[{"id": "i", "model": "m", "tp": 2}]), SITE)
    assert started(made.files["start.sh"])["head"][3] == "--port=6379"
    assert made.remarks[-1].endswith("--ray HEAD:6379")
    with pytest.raises(FleetError, match=r"instances\[0\].tp: say how many GPUs"):
        render_ray(fleet_of(instances=[{"id": "i", "model": "m"}]), SITE)
