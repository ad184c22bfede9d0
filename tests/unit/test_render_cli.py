"""`infermesh render` as it is called: targets, options, files, and what is filled in first."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from infermesh.cli import main
from tests.kit.rendering import EXAMPLES

CONTAINERS = str(EXAMPLES / "containers.yaml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("swarm", CONTAINERS), "'swarm' is not a target; there are compose, k8s, ray"),
        (("k8s", CONTAINERS, "--node", "gpu-1"), "--node is for compose"),
        (("k8s", CONTAINERS, "--autoscaler", "vpa"), "there are hpa, keda, none"),
        (("compose", "nowhere.yaml"), "nowhere.yaml: No such file"),
        (("compose", str(EXAMPLES / "data-centre.yaml")), "models[0].lora: not served yet"),
    ],
)
def test_bad_usage_says_what_there_is(
    words: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", *words, "-o", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_are_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "compose", CONTAINERS, "-o", str(tmp_path)]) == 0
    written = {Path(line) for line in capsys.readouterr().out.splitlines()}
    assert written == {path for path in tmp_path.rglob("*") if path.is_file()}
    assert tmp_path / "compose.yaml" in written


def test_models_without_instances_are_placed_first(tmp_path: Path) -> None:
    assert main(["render", "k8s", str(EXAMPLES / "heap-of-cards.yaml"), "-o", str(tmp_path)]) == 0
    listed = yaml.safe_load((tmp_path / "kustomization.yaml").read_text())["resources"]
    assert "qwen1-5-72b-a800-80g.yaml" in listed and "bge-m3-v100-32g.yaml" in listed
    speeds = (tmp_path / "qwen1-5-72b-a800-80g.yaml").read_text()
    assert "--prefill-tps" in speeds and "- catalogue" in speeds
