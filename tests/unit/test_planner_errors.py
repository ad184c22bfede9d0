"""What `plan` refuses: everything at once, each with its key's path and a way out; and its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from infermesh.cli import main

HEAP = Path(__file__).resolve().parents[2] / "deploy" / "examples" / "heap-of-cards.yaml"
LARGE = "{parameters: 72.3e9, layers: 80, hidden_size: 8192, heads: 64, max_context: 32768, vocabulary: 152064}"


def told(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    path = tmp_path / "fleet.yaml"
    path.write_text("version: 1\n" + text)
    code = main(["plan", str(path), "--no-simulate", *words])
    return code, capsys.readouterr().err.splitlines()


def test_all_faults_at_once_with_path_and_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "m.gguf").write_text("no")
    text = f"""
models:
  - {{id: large, kind: llm, source: x/large, architecture: {LARGE}}}
  - {{id: broken, kind: llm, source: ./broken}}
  - {{id: gguf, kind: llm, source: ./m.gguf}}
  - {{id: hub, kind: llm, source: nobody/nothing}}
nodes:
  - {{name: a, device: A800-80, count: 8}}
  - {{name: b, device: V100-32G, count: 6, interconnect: pcie}}
  - {{name: c, device: A800-80G}}
  - {{name: d, device: CPU-AVX512}}
  - {{name: e, device: A800-80G, count: 8}}
instances:
  - {{id: i, model: large, node: e, tp: 5, cards: [0, 1, 2, 3, 4]}}
  - {{id: j, model: large, node: b, tp: 2}}
devices: {{H20-141G: {{memory_mib: 143771}}}}
"""
    code, lines = told(text, tmp_path, capsys)
    faults = dict(line.strip().split(": ", 1) for line in lines[1:])
    assert code == 2 and "faults" in lines[0]
    for path, words in {
        "devices.H20-141G": "is a new card: bandwidth_gbs, tflops must be told too",
        "nodes[0].device": "'A800-80' is not in the hardware catalogue: did you mean A800-80G? It has H200-141G",
        "nodes[2].count": "is needed to plan: how many cards the host has",
        "nodes[3].memory_gib": "is needed to plan with CPU-AVX512",
        "nodes[3].cpus": "is needed to plan with CPU-AVX512",
        "models[1].source": "config.json: not JSON",
        "models[2].source": "no GGUF file that can be read",
        "models[3].source": "is a hub name, and the model is not on this disk; plan downloads nothing; point `source`",
        "instances[0].tp": "tp 5 does not divide 64 attention heads; it may be 1, 2, 4, 8, 16",
        "instances[1].engine": "vLLM does not run on V100-32G (sm_70); openai-http, sentence-transformers do",
        "instances[1]": "does not fit: 67.3 GiB of weights + ",
    }.items():
        assert words in faults.get(path, ""), (path, faults.get(path))


def test_a_model_that_fits_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"""
models: [{{id: large, kind: llm, source: x/large, dtype: bf16, architecture: {LARGE}}}]
nodes: [{{name: a, device: A100-40G, count: 2}}, {{name: v, device: V100-32G, count: 5}}]
"""
    code, lines = told(text, tmp_path, capsys)
    [fault] = lines[1:]
    assert code == 2 and fault.strip().startswith("models[0]: fits nowhere (a: at tp 2 each A100-40G needs 67.3 GiB of")
    for words in ("v: at tp 4 each V100-32G needs", "and has 28.6 (31.7 × 0.9)", "int4 weights fit on a at TP2",
                  "8 A100-40G in one host", "2 × H100-80G (159 GiB)"):  # fmt: skip
        assert words in fault


def test_a_model_over_two_hosts_is_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"""
models: [{{id: large, kind: llm, source: x/large, dtype: bf16, architecture: {LARGE}}}]
nodes: [{{name: a, device: A100-40G, count: 4}}, {{name: b, device: A100-40G, count: 4, network: rdma}}]
traffic: {{requests_per_s: 0.1, prompt_tokens: 2000, output_tokens: 200}}
"""
    path = tmp_path / "fleet.yaml"
    path.write_text("version: 1\n" + text)
    assert main(["plan", str(path), "--no-simulate", "--json"]) == 0
    [one] = json.loads(capsys.readouterr().out)["instances"]
    assert (one["tp"], one["pp"], one["node"]) == (4, 2, "a") and "cards" not in one
    assert "TP4 inside each of 2 hosts (a, b), PP2 across them" in one["reasons"][0]


@pytest.mark.parametrize(
    ("instance", "fault"),
    [
        ("{id: i, model: m, node: a, tp: 16}", "instances[0].tp: 16 cards, node a has 8: TP stays inside a host"),
        ("{id: i, model: m, node: a, tp: 8, pp: 2, cards: [0]}", "instances[0].cards: 1 cards for tp 8 × pp 2"),
    ],
)
def test_a_file_that_contradicts_itself(
    instance: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""
models: [{{id: m, kind: llm, source: x/large, architecture: {LARGE}}}]
nodes: [{{name: a, device: A800-80G, count: 8}}]
instances: [{instance}]
"""
    code, lines = told(text, tmp_path, capsys)
    assert code == 2 and any(fault in line for line in lines), lines


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "completed.yaml"
    assert main(["plan", str(HEAP), "-o", str(out), "--json"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["plan"]["simulated"]["holds"] is True and "written: " in said.err
    assert document["models"][0]["id"] == "qwen1.5-72b" and len(document["instances"]) == 16
    assert yaml.safe_load(out.read_text())["instances"][0]["tp"] == 8
    sim = ["sim", "--fleet", str(out), "--generate", "rps=1,requests=40,prompt=2000,output=50", "--json"]
    assert main(sim) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["policies"]["infermesh"]["completed"] == 40 and "assumed" not in said.err
    assert main(["plan", str(HEAP), "--no-simulate", "--explain", "a800-1-a"]) == 0
    assert "concurrent requests = ⌊KV tokens / request length⌋ = ⌊59,634 / 4,396⌋ = 13" in capsys.readouterr().out
    assert main(["plan", str(HEAP), "--no-simulate", "--explain", "x"]) == 2
    assert main(["plan", str(tmp_path / "none.yaml")]) == 2
    capsys.readouterr()
    assert main(["plan", str(HEAP)]) == 0
    shown = capsys.readouterr().out
    for words in ("16 instances on 6 nodes", "HEADROOM", "Held against the arithmetic:", "the objective holds"):
        assert words in shown
