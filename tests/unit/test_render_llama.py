"""GGUF models over several hosts: llama.cpp's own processes as systemd units beside what is rendered."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from infermesh.cli import main
from tests.kit.gguf_model import qwen_72b_q2_k
from tests.kit.rendering import parsed

FLEET = """
version: 1
models: [{{id: qwen, kind: llm, source: {source}, max_context: 8192}}]
nodes: [{{name: a, device: P40, count: 1, address: 10.0.0.1}}, {{name: b, device: P40, count: 1, address: 10.0.0.2}}]
registry: consul://10.0.0.9:8500
traffic: {{requests_per_s: 0.01, prompt_tokens: 1000, output_tokens: 200}}
"""
UNITS = {"llama.cpp/a/a-server.service", "llama.cpp/b/a-worker.service"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_72b_q2_k(tmp_path_factory.mktemp("gguf"))


def rendered(folder: Path, target: str, text: str, *more: str) -> int:
    (folder / "fleet.yaml").write_text(text)
    return main(["render", target, str(folder / "fleet.yaml"), "-o", str(folder / "out"), *more])


def unit(path: Path) -> ConfigParser:
    found = ConfigParser(interpolation=None, strict=True)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read(path)
    return found


@pytest.mark.parametrize(("target", "more"), [("compose", ("--node", "a")), ("k8s", ()), ("ray", ("--grace-s", "5"))])
def test_every_target_has_the_units_and_adopts_the_server(
    target: str, more: tuple[str, ...], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = "\nrayClusters: [{name: c, headAddress: '10.0.0.1:6379'}]" if target == "ray" else ""
    assert rendered(tmp_path, target, FLEET.format(source=model) + ray, *more) == 0
    out, told = tmp_path / "out", capsys.readouterr().err
    assert {str(path.relative_to(out)) for path in out.rglob("*.service")} == UNITS
    worker, server = (unit(out / name)["Service"] for name in sorted(UNITS, reverse=True))
    assert (
        worker["ExecStart"] == "rpc-server -H 10.0.0.2 -p 50052" and worker["Environment"] == "CUDA_VISIBLE_DEVICES=0"
    )
    assert server["ExecStart"].startswith(f"llama-server -m {model} -c 8192 -np 1 -ngl 999 --rpc 10.0.0.2:50052 --ten")
    assert server["Restart"] == worker["Restart"] == "always", "llama.cpp ends when a worker does"
    assert "llama.cpp/b/a-worker.service on b, then llama.cpp/a/a-server.service on a" in told
    if target == "compose":
        (service,) = [
            one for one in yaml.safe_load((out / "compose.yaml").read_text())["services"].items() if one[0] == "a"
        ]
        assert parsed(service[1]["command"]).source == "http://10.0.0.1:8080/v1"
        assert not [mount for mount in service[1]["volumes"] if str(model.parent) in mount], "it reads no weights"
    if target == "k8s":
        pod = next(item for item in yaml.safe_load_all((out / "a.yaml").read_text()) if item["kind"] == "Deployment")
        assert "nodeSelector" not in pod["spec"]["template"]["spec"], "the server's host may be no node of the cluster"


def test_a_source_seen_from_here_is_refused_where_a_unit_would_read_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in model.parent.glob("*.gguf"):
        (tmp_path / part.name).symlink_to(part)
    assert rendered(tmp_path, "k8s", FLEET.format(source=model.name)) == 2
    assert "models[0].source: " in (said := capsys.readouterr().err) and "needs /an/absolute/path, the same" in said


def test_a_server_that_is_only_expected_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
version: 1
models: [{id: qwen, kind: llm, source: /models/qwen.gguf}]
instances: [{id: a, model: qwen, engine: openai-http, url: "http://10.0.0.1:8080/v1"}]
"""
    assert rendered(tmp_path, "k8s", text) == 0
    assert "a: expects a llama.cpp at http://10.0.0.1:8080/v1, of which nothing is" in capsys.readouterr().err


def test_words_are_as_systemd_reads_them(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my 100% models"
    folder.mkdir()
    for part in model.parent.glob("*.gguf"):
        (folder / part.name).symlink_to(part)
    assert rendered(tmp_path, "k8s", FLEET.format(source=folder / model.name)) == 0
    server = unit(tmp_path / "out" / "llama.cpp" / "a" / "a-server.service")["Service"]["ExecStart"]
    assert f'-m "{tmp_path}/my 100%% models/{model.name}" -c 8192' in server
