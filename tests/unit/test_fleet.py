"""The fleet file: what is read, what is refused and in which words."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.fleet import Fleet, FleetError, parse_fleet, schema_text, unserved
from deploy.launch.commands import (
    Host,
    Shared,
    gateway_command,
    instance_command,
    of_this_host,
    start_faults,
)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))
MODEL = {"id": "m", "kind": "llm", "source": "./m"}


def fleet_of(**parts: Any) -> Fleet:
    return parse_fleet(yaml.safe_dump({"version": 1, "models": [MODEL], **parts}))


def faults_of(**parts: Any) -> list[str]:
    with pytest.raises(FleetError) as caught:
        fleet_of(**parts)
    return [str(fault) for fault in caught.value.faults]


# What is written -> path and words of the fault that is told.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"model": []}, "model: unknown key; did you mean `models`?"),
    "unknown key inside": (
        {"instances": [{"id": "i", "model": "m", "vram_ration": 0.5}]},
        "instances[0].vram_ration: unknown key; did you mean `vram_ratio`?",
    ),
    "british key": (
        {"instances": [{"id": "i", "model": "m", "quantisation": "awq"}]},
        "did you mean `quantization`?",
    ),
    "kind": (
        {"models": [{"id": "m", "kind": "vlm"}]},
        "models[0].kind: input should be 'llm', 'embedding' or 'rerank'",
    ),
    "missing": ({"models": [{"id": "m"}]}, "models[0].kind: is needed"),
    "version": ({"version": 2}, "version: input should be 1, not 2"),
    "no models": ({"models": []}, "models: "),
    "type": ({"instances": [{"id": "i", "model": "m", "tp": "four"}]}, "instances[0].tp: "),
    "range": ({"instances": [{"id": "i", "model": "m", "vram_ratio": 1.5}]}, "less than or equal to 1, not 1.5"),
    "odd id": ({"instances": [{"id": "a b", "model": "m"}]}, "instances[0].id: "),
    "same id": (
        {"instances": [{"id": "i", "model": "m"}, {"id": "i", "model": "m"}]},
        "instances[1].id: 'i' is there already, at instances[0]",
    ),
    "no such model": ({"instances": [{"id": "i", "model": "n"}]}, "instances[0].model: 'n' is not there"),
    "no such node": ({"instances": [{"id": "i", "model": "m", "node": "x"}]}, "instances[0].node: 'x' is not there"),
    "engine of another kind": (
        {"instances": [{"id": "i", "model": "m", "engine": "sentence-transformers"}]},
        "does not serve kind llm; allowed: vllm, openai-http, scripted",
    ),
    "option of another engine": (
        {"instances": [{"id": "i", "model": "m", "engine": "scripted", "tp": 2}]},
        "instances[0].tp: engine scripted does not take it; it is for vllm",
    ),
    "speed of another kind": (
        {"instances": [{"id": "i", "model": "m", "speed": {"step_ms": 20, "fixed_ms": 5}}]},
        "instances[0].speed.fixed_ms: is not a number of kind llm; it takes prefill_tps, ",
    ),
    "context": ({"instances": [{"id": "i", "model": "m", "context": [9, 9]}]}, "0 <= min < max, not [9, 9]"),
    "card not there": (
        {
            "nodes": [{"name": "n", "count": 2}],
            "instances": [{"id": "i", "model": "m", "node": "n", "cards": [1, 2]}],
        },
        "instances[0].cards: node n has cards 0 .. 1",
    ),
    "cards and tp": (
        {"instances": [{"id": "i", "model": "m", "cards": [0, 1, 2], "tp": 2}]},
        "instances[0].cards: 3 cards for tp 2 × pp 1",
    ),
    "no url": (
        {"models": [{"id": "m", "kind": "llm"}], "instances": [{"id": "i", "model": "m", "engine": "openai-http"}]},
        "instances[0].url: engine openai-http needs the server's URL",
    ),
    "no source": (
        {"models": [{"id": "m", "kind": "llm"}], "instances": [{"id": "i", "model": "m"}]},
        "models[0].source: engine vllm needs a hub name or a local folder",
    ),
    "alias is an id": ({"models": [MODEL, {**MODEL, "id": "n", "aliases": ["m"]}]}, "models[1].aliases[0]: 'm' is"),
    "fallback of another kind": (
        {"models": [{**MODEL, "fallback": "e"}, {"id": "e", "kind": "embedding"}]},
        "models[0].fallback: 'e' is not there (allowed: none)",
    ),
    "fallback of itself": (
        {"models": [{**MODEL, "fallback": "m"}]},
        "models[0].fallback: a model is no fallback of its",
    ),
    "fallbacks in a circle": (
        {"models": [{**MODEL, "id": i, "fallback": j} for i, j in ("ab", "bc", "cb")]},
        "models[1].fallback: goes in a circle: b -> c -> b",
    ),
    "weighted alias is an id": (
        {"routing": {"aliases": {"m": [{"model": "m"}]}}},
        "routing.aliases.m: 'm' is a model's id",
    ),
    "weighted alias is an alias": (
        {"models": [{**MODEL, "aliases": ["n"]}], "routing": {"aliases": {"n": [{"model": "m"}]}}},
        "routing.aliases.n: 'n' is an alias already, at models[0].aliases",
    ),
    "alias of an alias": (
        {"routing": {"aliases": {"x": [{"model": "m"}], "y": [{"model": "x"}]}}},
        "routing.aliases.y[0].model: 'x' is an alias; name models by their ids",
    ),
    "alias of nothing": (
        {"routing": {"aliases": {"x": [{"model": "n"}]}}},
        "routing.aliases.x[0].model: 'n' is not there",
    ),
    "alias without models": ({"routing": {"aliases": {"x": []}}}, "routing.aliases.x: "),
    "variant twice": (
        {"routing": {"aliases": {"x": [{"model": "m"}, {"model": "m"}]}}},
        "routing.aliases.x[1].model: 'm' is there already",
    ),
    "variants of two kinds": (
        {
            "models": [MODEL, {"id": "e", "kind": "embedding"}],
            "routing": {"aliases": {"x": [{"model": "m"}, {"model": "e"}]}},
        },
        "routing.aliases.x[1].model: 'e' is of kind embedding, the first one of kind llm",
    ),
    "weight": (
        {"routing": {"aliases": {"x": [{"model": "m", "weight": 0}]}}},
        "routing.aliases.x[0].weight: input should be greater than 0, not 0",
    ),
    "split of cards that nobody has": (
        {
            "nodes": [{"name": "n", "device": "A800-80G"}],
            "instances": [{"id": "i", "model": "m", "node": "n"}],
            "routing": {"split": {"A800": 6}},
        },
        "routing.split.A800: no node has such cards; did you mean `A800-80G`? (allowed: A800-80G)",
    ),
    "template of an embedding": (
        {"models": [{"id": "e", "kind": "embedding", "tool_parser": "hermes"}]},
        "models[0].tool_parser: is for kind llm",
    ),
    "registry": ({"registry": "etcd://x"}, "registry: "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str) -> None:
    parts, expected = BAD[name]
    assert any(expected in fault for fault in faults_of(**parts)), faults_of(**parts)


def test_only_those_in_a_circle_are_told() -> None:
    found = faults_of(models=[{**MODEL, "id": i, "fallback": j} for i, j in ("ab", "bc", "cb")])
    assert [fault.split(":")[0] for fault in found] == ["models[1].fallback", "models[2].fallback"]


def test_all_faults_come_at_once() -> None:
    found = faults_of(modles=[], nodes=[{"name": "n", "cuont": 1}], instances=[{"id": "i", "model": "m", "tp": 0}])
    assert [fault.split(":")[0] for fault in found] == ["nodes[0].cuont", "instances[0].tp", "modles"]
    found = faults_of(instances=[{"id": "i", "model": "x", "node": "y"}, {"id": "i", "model": "z"}])
    assert len(found) == 4
    found = faults_of(routing={"aliases": {"a": [{"model": "m", "weight": -1}]}})
    assert [fault.split(":")[0] for fault in found] == ["routing.aliases.a[0].weight"]  # and not an empty list besides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 1\nversion: 1\n", "line 2, column 1: not YAML: key 'version' is given twice"),
        ("models: [", "not YAML"),
        ("- 1\n", "file: must be a mapping with version, models"),
        ("", "file: must be a mapping"),
        ("a: !!python/object:os.system {}", "not YAML"),
    ],
)
def test_a_file_that_is_no_fleet(text: str, expected: str) -> None:
    with pytest.raises(FleetError, match=r"fleet\.yaml: 1 fault") as caught:
        parse_fleet(text, "fleet.yaml")
    assert expected in str(caught.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_and_start_unless_they_wait_for_a_feature(path: Path) -> None:
    fleet = parse_fleet(path.read_text(), path.name)
    ray = path.stem == "ray"
    waits = unserved(fleet, "ray" if ray else "up")
    assert bool(waits) == (path.stem in ("data-centre", "elastic"))
    if not waits:
        assert [fault.path for fault in start_faults(fleet, ray=ray)] == ([] if fleet.instances else ["instances"])


def keys_of(document: Any, schema: dict[str, Any], whole: dict[str, Any]) -> set[str]:
    """`Title.key` of every key that a document uses, by the schema's own titles."""
    if isinstance(document, list):
        return set().union(*(keys_of(item, schema.get("items", {}), whole) for item in document)) if document else set()
    options = [schema, *schema.get("anyOf", [])]
    parts = [whole["$defs"][o["$ref"].rpartition("/")[2]] if "$ref" in o else o for o in options]
    found: set[str] = set()
    for part in parts:
        for key, value in document.items() if isinstance(document, dict) else ():
            if key in part.get("properties", {}):
                found |= {f"{part['title']}.{key}"} | keys_of(value, part["properties"][key], whole)
            else:  # a mapping of the user's own names
                for others in (part.get("additionalProperties"), *part.get("patternProperties", {}).values()):
                    found |= keys_of(value, others, whole) if isinstance(others, dict) else set()
    return found


def test_every_key_has_an_example() -> None:
    whole = json.loads(schema_text())
    known = {
        f"{part['title']}.{key}" for part in (whole, *whole["$defs"].values()) for key in part.get("properties", {})
    }
    used = set().union(*(keys_of(yaml.safe_load(path.read_text()), whole, whole) for path in EXAMPLES))
    assert known - used == set()


def test_the_schema_is_fresh() -> None:
    assert (ROOT / "deploy" / "fleet.schema.json").read_text() == schema_text(), "run python -m deploy.fleet --write"


def test_what_waits_for_a_feature_is_refused_by_name() -> None:
    path = ROOT / "deploy" / "examples" / "data-centre.yaml"
    paths = [fault.path for fault in unserved(parse_fleet(path.read_text()))]
    assert paths == [
        "models[0].lora",
        *(f"instances[0].{key}" for key in ("min", "max")),
        *("instances[0].ray_cluster", "gateway.workers", "rayClusters"),
    ]


def test_every_registry_that_processes_take_may_stand_in_the_file() -> None:
    for url in ("mesh://10.0.0.5:50049,10.0.0.6:50049", "consul://10.0.0.5:8500", "consuls://10.0.0.5:8501", ""):
        assert fleet_of(registry=url).registry == url


def test_numbers_in_an_environment_are_texts() -> None:
    fleet = fleet_of(instances=[{"id": "i", "model": "m", "environment": {"A": 1, "B": True, "C": "x"}}])
    assert fleet.instances[0].environment == {"A": "1", "B": "true", "C": "x"}


# ---- the commands made from it

HOST = Host("/main/python", "/llm/python", 4, {"PATH": "/bin", "INFERMESH_LISTEN": "x", "INFERMESH_OFFLINE": "1"})
SHARED = Shared(registry="mesh://127.0.0.1:9", grace_s=5)


def command_of(instance: dict[str, Any], model: dict[str, Any] | None = None, host: Host = HOST, **parts: Any) -> Any:
    fleet = fleet_of(models=[model or MODEL], instances=[{"id": "i", "model": "m", **instance}], **parts)
    return instance_command(fleet, fleet.instances[0], host, SHARED, Path("run/i.json"))


def options(argv: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in pairwise(argv) if name.startswith("--")}


def test_vllm_starts_in_its_own_interpreter_on_the_visible_gpus() -> None:
    made = command_of({"engine_args": {"enforce_eager": True}, "context": [0, 4096]}, {**MODEL, "dtype": "fp16"})
    assert made.argv[:5] == ("/llm/python", "-P", "-m", "infermesh.cli", "llm")
    found = options(made.argv)
    assert found["--tp"] == "4" and found["--dtype"] == "float16" and found["--context"] == "0-4096"
    assert found["--engine-arg"] == "enforce_eager=true" and found["--registry"] == "mesh://127.0.0.1:9"
    assert made.env == {"PATH": "/bin", "INFERMESH_OFFLINE": "1"}, "a variable meant for one process reaches no child"


def test_cards_are_what_the_engine_sees() -> None:
    made = command_of({"cards": [2, 3], "environment": {"X": "1"}})
    assert made.env["CUDA_VISIBLE_DEVICES"] == "2,3" and made.env["X"] == "1"
    assert options(made.argv)["--tp"] == "2"
    encoder = command_of({"cards": [2, 3], "replicas": 2}, {"id": "m", "kind": "embedding", "source": "s"})
    assert options(encoder.argv)["--devices"] == "cuda:2,cuda:3" and options(encoder.argv)["--replicas"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in encoder.env and encoder.argv[0] == "/main/python"


def test_the_planners_speed_is_given_where_the_file_has_none() -> None:
    fleet = fleet_of(
        models=[MODEL], instances=[{"id": "i", "model": "m"}, {"id": "j", "model": "m", "speed": {"step_ms": 9}}]
    )
    speed = {"prefill_tps": 3880.0, "step_ms": 28.5}
    made = [instance_command(fleet, item, HOST, SHARED, Path("run/i.json"), speed) for item in fleet.instances]
    first, second = (options(one.argv) for one in made)
    assert first["--prefill-tps"] == "3880.0" and first["--speed-source"] == "catalogue"
    assert second["--step-ms"] == "9.0" and "--speed-source" not in second and "--prefill-tps" not in second


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="i: vLLM is not installed; run `make setup`"):
        command_of({}, host=Host("/main/python", "", 0, {}))
    assert command_of({"python": "/x"}, host=Host("/main/python", "", 0, {})).argv[0] == "/x"


def test_a_prompt_template_travels_in_a_file() -> None:
    made = command_of({}, {**MODEL, "prompt_template": {"user": "U: {}", "ai": "A: {}"}})
    path = options(made.argv)["--prompt-template"]
    assert json.loads(made.files[Path(path)]) == {"sys": "", "user": "U: {}", "ai": "A: {}", "sep": ""}


def test_every_command_is_understood_by_the_verb_that_it_calls() -> None:
    """Parsed by the command line itself and turned into settings, without starting anything."""
    from infermesh.cli import embedding, gateway, llm, serve_rerank  # noqa: F401  they must import
    from infermesh.cli.verbs import load

    consul = {f"{name}-file": "f" for name in ("token", "ca", "cert", "key")} | {"prefix": "p"}
    all_of_it = Shared("consul://h:1", "k.yaml", "o.key", True, 5, "debug", registry_options=consul)
    made = [gateway_command(fleet_of(), HOST, all_of_it, grpc="127.0.0.1:0", http="127.0.0.1:0", ready_file=Path("r"))]
    for path in EXAMPLES:
        fleet = parse_fleet(path.read_text())
        made += [instance_command(fleet, item, HOST, all_of_it, Path("run/i.json")) for item in fleet.instances]
    for one in made:
        verb, words = one.argv[4], list(one.argv[5:])
        assert options(one.argv)["--registry-token-file"] == "f" and options(one.argv)["--registry-prefix"] == "p"
        load(verb).make_context(verb, words)


def test_the_fleets_routing_is_the_gateways() -> None:
    """Through the command line itself: what the file says is what the gateway's router goes by."""
    from infermesh.cli.gateway import settings_of
    from infermesh.cli.verbs import load

    tiers = parse_fleet((ROOT / "deploy" / "examples" / "tiers.yaml").read_text())
    made = gateway_command(tiers, HOST, SHARED, grpc="127.0.0.1:0", http="", ready_file=Path("r"))
    parsed = load("gateway").make_context("gateway", list(made.argv[5:])).params
    settings = settings_of({name: value for name, value in parsed.items() if value not in (None, ())})
    policy = settings.routing.policy({})
    assert policy.fallbacks == {"large-v1": "small", "large-v2": "small"}
    assert policy.aliases == {"chat": (("large-v1", 95.0), ("large-v2", 5.0))}
    assert policy.split == {"A800-80G": 6.0, "H20-96G": 4.0}
    assert (policy.ttft_s, settings.routing.tpot_ms) == (2.0, 80.0)
    bare = gateway_command(fleet_of(), HOST, SHARED, grpc="127.0.0.1:0", http="", ready_file=Path("r"))
    assert not {"--fallback", "--alias", "--split", "--objective-ttft-s", "--objective-tpot-ms"} & set(bare.argv)


def test_a_split_by_cards_that_are_detected_is_taken() -> None:
    fleet = fleet_of(instances=[{"id": "i", "model": "m"}], routing={"split": {"A800-80G": 6}})
    assert fleet.routing.split == {"A800-80G": 6.0}


def test_several_nodes_need_the_name_of_this_one() -> None:
    nodes = [{"name": "a"}, {"name": "b"}]
    instances = [{"id": "i", "model": "m", "node": "a"}, {"id": "j", "model": "m", "node": "b"}]
    fleet = fleet_of(nodes=nodes, instances=instances)
    assert [item.id for item in of_this_host(fleet, "b")] == ["j"]
    for node, words in (("", "--node a | b"), ("c", "it has a, b")):
        with pytest.raises(ValueError, match=words.replace("|", r"\|")):
            of_this_host(fleet, node)
