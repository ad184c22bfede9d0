"""GGUF headers: what llama.cpp puts on cards and in RAM, and over how many cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.fleet import FleetError, parse_fleet
from deploy.model_files import read_models
from deploy.model_files.gguf_file import read_gguf
from deploy.planner.catalogue import GIB, shipped
from deploy.planner.config_json import Unreadable
from deploy.planner.document import plan_document
from deploy.planner.gguf_split import on_one_card, split_layers
from deploy.planner.memory import Setup, kv_per_token
from deploy.planner.planner import plan
from tests.kit.gguf_model import qwen_72b_q2_k


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_72b_q2_k(tmp_path_factory.mktemp("gguf"))


def test_the_header_of_a_split_model(model: Path) -> None:
    shape = read_gguf(model)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.hidden) == (80, 64, 8, 128, 8192)
    assert shape.parameters == pytest.approx(72.7e9, rel=0.01) and shape.vocabulary == 152064
    assert shape.gguf is not None and len(set(shape.gguf.layers)) == 1
    assert read_gguf(model.with_name(model.name.replace("00001-of", "00004-of"))).weight_bytes == shape.weight_bytes


def test_72b_q2_k_at_8k_is_what_gguf_parser_says(model: Path) -> None:
    """seed 003_377927cb58f3b15a.txt: 80 + 1 layers take 28.89 GiB of VRAM, 2.50 GiB of it KV; a P40 has 22 GB."""
    shape, p40 = read_gguf(model), shipped().cards["P40"]
    need = on_one_card(shape, 8192)
    assert need.value / GIB == pytest.approx(28.89, rel=0.05)
    cached = kv_per_token(shape, Setup("int4", 8192)).value * 8192
    assert cached / GIB == pytest.approx(2.50, rel=0.001)
    one, two = split_layers(shape, [p40], 8192), split_layers(shape, [p40, p40], 8192)
    assert not one.fits and two.fits and sum(two.layers) == 80 and abs(two.layers[0] - two.layers[1]) <= 6
    # The RAM column says 259.89 to 409.89 MiB; the token table is what is in it.
    assert 250 < two.ram.value / 2**20 < 420
    assert "KV cache = KV a token and card × context = 327,680 × 8,192" in "\n".join(map(str, need.working()))


def test_two_hosts_with_a_p40_each_run_it_with_an_rpc_worker(model: Path) -> None:
    text = f"""
version: 1
models: [{{id: qwen, kind: llm, source: {model}, max_context: 8192}}]
nodes: [{{name: a, device: P40, count: 1, address: 10.0.0.1}}, {{name: b, device: P40, count: 1, address: 10.0.0.2}}]
traffic: {{requests_per_s: 0.01, prompt_tokens: 1000, output_tokens: 200}}
"""
    fleet = parse_fleet(text)
    read = read_models(fleet, Path())
    found = plan(fleet, read.shapes, shipped(), read.unread, "x")
    [one] = found.placed
    assert one.instance.engine == "openai-http" and one.instance.url == "http://10.0.0.1:8080/v1"
    assert set(one.commands) == {"a", "b"} and one.commands["b"].endswith("rpc-server -H 10.0.0.2 -p 50052")
    assert f"llama-server -m {model} -c 8192 -np 1 -ngl 999 --rpc 10.0.0.2:50052 --tensor-split" in one.commands["a"]
    assert one.commands["a"].endswith("--host 10.0.0.1 --port 8080")
    told = plan_document(found, None)["instances"][0]
    # Workers first, and the head counts as a layer: else llama.cpp puts a layer more on the first card than it holds.
    worker, own = told["layers_per_card"]
    assert f"--tensor-split {worker},{own + 1} " in one.commands["a"]
    assert sum(told["layers_per_card"]) == 80 and told["vram_gib"] == pytest.approx(28.89, rel=0.05)


def test_two_models_on_the_same_hosts_listen_apart(model: Path) -> None:
    text = f"""
version: 1
models:
  - {{id: q, kind: llm, source: {model}, max_context: 8192}}
  - {{id: r, kind: llm, source: {model}, max_context: 8192}}
nodes: [{{name: a, device: T4, count: 4, address: 10.0.0.1}}, {{name: b, device: T4, count: 2, address: 10.0.0.2}}]
traffic: {{requests_per_s: 0.01, prompt_tokens: 1000, output_tokens: 200}}
"""
    fleet = parse_fleet(text)
    read = read_models(fleet, Path())
    found = plan(fleet, read.shapes, shipped(), read.unread, "x")
    doors = [one.instance.url for one in found.placed]
    doors += [
        word for one in found.placed for line in one.commands.values() for word in line.split() if ":5005" in word
    ]
    assert len(found.placed) == 2 and len(set(doors)) == len(doors)


CARDS = [
    # Cards by host, and how many of them take part in the 28.89 GiB of seed 003_377927cb58f3b15a.txt.
    ([("P40", 1), ("P40", 1)], 2, "the seed's two workers with a P40 each"),
    ([("P40", 2)], 2, "one host: no worker is needed"),
    ([("T4", 1), ("T4", 1), ("T4", 1)], 3, "three smaller ones"),
    ([("T4", 2), ("T4", 2)], 3, "the second host gives one card"),
    ([("P40", 1), ("T4", 1)], 2, "no kind has enough alone: unlike cards"),
    ([("A800-80G", 1)], 1, "one card holds all"),
    ([("T4", 1), ("T4", 1)], 0, "27 GiB do not"),
]


@pytest.mark.parametrize(("hosts", "cards", "why"), CARDS, ids=lambda value: str(value)[:40])
def test_the_fewest_cards_that_hold_it(model: Path, hosts: list[tuple[str, int]], cards: int, why: str) -> None:
    nodes = ", ".join(
        f"{{name: n{at}, device: {device}, count: {count}, address: 10.0.0.{at + 1}}}"
        for at, (device, count) in enumerate(hosts)
    )
    fleet = parse_fleet(
        f"version: 1\nmodels: [{{id: q, kind: llm, source: {model}, max_context: 8192}}]\nnodes: [{nodes}]\n"
        "traffic: {requests_per_s: 0.01, prompt_tokens: 1000, output_tokens: 200}\n"
    )
    read = read_models(fleet, Path())
    if not cards:
        said = r"fits nowhere: 28\.7\d GiB .* free are 1 T4 in n0, 1 T4 in n1\. Ways out: 3 T4, in one host or several"
        with pytest.raises(FleetError, match=said):
            plan(fleet, read.shapes, shipped(), read.unread, "x")
        return
    found = plan(fleet, read.shapes, shipped(), read.unread, "x")
    (one,) = found.placed
    document = plan_document(found, None)["instances"][0]
    layers = document.get("layers_per_card", [80])
    assert (len(layers), sum(layers)) == (cards, 80), why
    catalogue = shipped().cards
    assert one.split is not None
    server = next(line for line in one.commands.values() if "llama-server" in line)
    rpc = [word for word in server.split() if word.endswith(":50052")]
    assert len(rpc) == (len(one.commands) > 1) and server.count(" -np 1 ") == 1
    held = sum(catalogue[device].memory * count for device, count in hosts)
    assert one.split.need.value < held
    for host, line in one.commands.items():
        address = f"10.0.0.{int(host[1:]) + 1}"
        assert f"-H {address} " in line or f"--host {address} " in line


def test_what_cannot_be_read_is_said(tmp_path: Path, model: Path) -> None:
    with pytest.raises(Unreadable, match="no such file"):
        read_gguf(tmp_path / "x.gguf")
    (tmp_path / "y.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(20))
    with pytest.raises(Unreadable, match=r"y\.gguf"):
        read_gguf(tmp_path / "y.gguf")
    (tmp_path / "z.gguf").write_text("not one")
    with pytest.raises(Unreadable, match="no GGUF file that can be read"):
        read_gguf(tmp_path / "z.gguf")
    lonely = tmp_path / model.name
    lonely.write_bytes(b"")
    with pytest.raises(Unreadable, match="6 of 7 parts are missing beside it"):
        read_gguf(lonely)
