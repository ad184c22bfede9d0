"""What an instance reserves on Ray, which cluster and nodes it gets, and what is said where there is no room."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.fleet import Fleet, FleetError, parse_fleet
from deploy.launch.on_ray.choose import RayNode, View, choose, lacks, missing
from deploy.launch.on_ray.cluster import explain
from deploy.launch.on_ray.need import GIB, SLIVER, Need, cluster_of, clusters, need_of, ray_faults
from deploy.launch.on_ray.survey import reach_faults, version_fault, view_of
from deploy.launch.programs import place_of


def fleet_of(instance: dict[str, Any], **more: Any) -> Fleet:
    models = [
        {"id": "big", "kind": "llm", "source": "org/big"},
        {"id": "vec", "kind": "embedding", "source": "org/vec"},
        {"id": "say", "kind": "llm"},
    ]
    nodes = [
        {"name": "a800", "device": "A800-80G", "count": 8},
        {"name": "h20", "device": "H20-96G", "count": 8},
        {"name": "cpu", "device": "CPU-AVX512"},
    ]
    return Fleet.model_validate(
        {"version": 1, "models": models, "nodes": nodes, "instances": [{"id": "i", "model": "big", **instance}], **more}
    )


@pytest.mark.parametrize(
    ("instance", "bundles"),
    [
        ({"node": "a800", "tp": 4}, [{"GPU": 4, "device:A800-80G": 4, "CPU": 1}]),
        ({"node": "a800", "cards": [4, 5, 6, 7]}, [{"GPU": 4, "device:A800-80G": 4, "CPU": 1}]),
        ({"node": "a800", "tp": 4, "pp": 2}, [{"GPU": 8, "device:A800-80G": 8, "CPU": 1}]),
        ({"tp": 2}, [{"GPU": 2, "CPU": 1}]),  # what NUMBER_GPUS: 2 becomes
        ({"resources": {"gpus": 0, "cpus": 8, "memory_gib": 16}}, [{"CPU": 8, "memory": 16 * GIB}]),
        ({"model": "vec", "node": "a800", "cards": [0]}, [{"GPU": 1, "device:A800-80G": 1, "CPU": 1}]),
        ({"model": "vec", "node": "cpu"}, [{"device:CPU-AVX512": SLIVER, "CPU": 1}]),
        ({"model": "say", "engine": "scripted"}, [{"CPU": 1}]),
        # Across hosts: the service's own bundle, then one card each, as vLLM's executor wants them.
        (
            {"node": "h20", "tp": 8, "pp": 2},
            [{"CPU": 1}, *[{"GPU": 1, "device:H20-96G": 1}] * 16],
        ),
    ],
)
def test_what_an_instance_reserves(instance: dict[str, Any], bundles: list[dict[str, float]]) -> None:
    fleet = fleet_of(instance)
    _, need = place_of(fleet, fleet.instances[0], clusters(fleet, "10.0.0.1:6379"))
    assert [resources for _, resources in need.bundles()] == bundles


def test_stages_share_hosts_where_they_fit() -> None:
    fleet = fleet_of({"node": "a800", "tp": 4, "pp": 4})
    need = need_of(fleet, fleet.instances[0], 16)
    assert (need.hosts, need.stages, need.tp, need.gpus, need.spans) == (2, 2, 4, 16, True)
    assert [host for host, _ in need.bundles()] == [0] + [0] * 8 + [1] * 8
    assert need.of_host(1) == {"GPU": 8, "device:A800-80G": 8}, "the service's CPU is asked of the first only"


def node(id: str, free: dict[str, float], total: dict[str, float] | None = None, *members: str) -> RayNode:
    return RayNode(id, f"10.0.0.{id}", total or free, free, members)


A800 = {"CPU": 64.0, "GPU": 8.0, "device:A800-80G": 8.0}
TP4 = Need(tp=4, device="A800-80G")


def test_instances_of_one_model_stand_apart() -> None:
    one, two = node("1", A800, A800, "big/i1"), node("2", A800, A800, "vec/e1")
    assert choose(TP4, "big", [one, two]) == (two,), "not beside another one of its model"
    assert choose(TP4, "vec", [one, two]) == (one,)
    assert choose(TP4, "big", [one, two], avoid="2") == (one,)
    assert choose(TP4, "big", [two], avoid="2") == (two,), "rather there than nowhere"
    full = {**A800, "GPU": 2.0}
    assert choose(TP4, "big", [node("1", full, A800)]) == ()


def test_a_pipeline_gets_whole_hosts() -> None:
    wide = Need(hosts=2, stages=1, tp=8, device="A800-80G")
    small, one, two = node("0", {**A800, "GPU": 4.0}, A800), node("1", A800), node("2", A800)
    assert choose(wide, "big", [small, one, two]) == (one, two)
    assert choose(wide, "big", [small, one]) == ()


@pytest.mark.parametrize(
    ("need", "nodes", "expected"),
    [
        (TP4, [], ["the cluster has no node"]),
        (
            TP4,
            [node("1", {**A800, "GPU": 1.0}, A800)],
            ["needs 4 GPU, 4 device:A800-80G, 1 CPU; 10.0.0.1: 1 of 8 GPU free; it starts as soon as that is free"],
        ),
        (
            TP4,
            [node("1", {"CPU": 4.0, "GPU": 8.0})],
            ["0 of 0 device:A800-80G free", "--resources='{\"device:A800-80G\": 4}'", "no node says"],
        ),
        (Need(tp=4), [node("1", {"CPU": 4.0, "GPU": 2.0})], ["no node is large enough", "--num-gpus=4"]),
        (Need(memory=64 * GIB), [node("1", {"CPU": 4.0, "memory": 8.0 * GIB})], ["8.0 GiB of 8.0 GiB memory free"]),
        (Need(hosts=2, tp=8, device="A800-80G"), [node("1", A800)], ["needs 2 hosts, each with 8 GPU", "add 1 such"]),
    ],
)
def test_what_is_missing_is_told(need: Need, nodes: list[RayNode], expected: list[str]) -> None:
    told = missing(need, nodes)
    assert all(words in told for words in expected) and "\n" not in told, told


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 4)), max_size=6),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_who_is_chosen_has_room_and_who_is_not_lacks_it(free: list[tuple[int, int, int]], hosts: int, tp: int) -> None:
    need = Need(hosts=hosts, tp=tp, device="x")
    nodes = [node(str(n), {"CPU": float(c), "GPU": float(g), "device:x": float(d)}) for n, (c, g, d) in enumerate(free)]
    chosen = choose(need, "m", nodes)
    assert len({host.id for host in chosen}) == len(chosen) in (0, hosts)
    assert all(not lacks(need.of_host(number), host.free) for number, host in enumerate(chosen))
    if not chosen and hosts == 1:
        assert all(lacks(need.of_host(0), host.free) for host in nodes)


CLUSTERS = [
    {"name": "one", "headAddress": "10.0.0.1:6379", "pythonVersion": "3.11.7"},
    {"name": "two", "headAddress": "10.0.0.2:6379"},
]


@pytest.mark.parametrize(
    ("chosen", "asked", "address"),
    [
        (None, "", "10.0.0.1:6379"),
        (1, "", "10.0.0.2:6379"),
        ("two", "", "10.0.0.2:6379"),
        (None, "two", "10.0.0.2:6379"),
        (0, "two", "10.0.0.1:6379"),
        (None, "ray-head.svc:6379", "ray-head.svc:6379"),
        ("one", "ray-head.svc:6379", "10.0.0.1:6379"),
    ],
)
def test_an_instance_chooses_its_cluster(chosen: str | int | None, asked: str, address: str) -> None:
    fleet = fleet_of({"tp": 1, "ray_cluster": chosen}, rayClusters=CLUSTERS)
    assert cluster_of(fleet, fleet.instances[0], clusters(fleet, asked)).headAddress == address


def test_index_0_of_an_imported_worker_is_whatever_is_asked_for() -> None:
    fleet = fleet_of({"tp": 1, "ray_cluster": 0})
    found = clusters(fleet, "10.0.0.9:6379")
    assert cluster_of(fleet, fleet.instances[0], found).headAddress == "10.0.0.9:6379"
    assert list(ray_faults(fleet, found)) == [] and clusters(fleet, "") == ()


@pytest.mark.parametrize(
    ("instance", "more", "expected"),
    [
        ({"tp": 1, "ray_cluster": "x"}, {}, "instances[0].ray_cluster: 'x' is not there: rayClusters is empty"),
        ({}, {}, "instances[0].tp: say how many GPUs it takes"),
        (
            {"tp": 1},
            {"rayClusters": [{"name": "a", "headAddress": "ray://h:10001"}]},
            "rayClusters[0].headAddress: a Ray",
        ),
        ({"tp": 1}, {"rayClusters": [{"name": "a", "headAddress": "h"}]}, "it is not HOST:PORT of a Ray head"),
    ],
)
def test_what_ray_cannot_do_is_told(instance: dict[str, Any], more: dict[str, Any], expected: str) -> None:
    fleet = fleet_of(instance, **more)
    told = [str(fault) for fault in ray_faults(fleet, clusters(fleet, "" if more else "10.0.0.1:6379"))]
    assert len(told) == 1 and expected in told[0], told


def test_addresses_and_names_that_are_not_there() -> None:
    fleet = fleet_of({"tp": 1})
    with pytest.raises(ValueError, match="ray start --address=HOST:6379 --num-cpus=0"):
        clusters(fleet, "ray://h:10001")
    text = (
        "version: 1\nmodels: [{id: m, kind: llm, source: s}]\nrayClusters: [{name: a, headAddress: 'h:1'}]\n"
        "instances: [{id: i, model: m, ray_cluster: 1}]\n"
    )
    with pytest.raises(FleetError, match=r"instances\[0\].ray_cluster: 1 is not there; rayClusters has 0 a"):
        parse_fleet(text)


MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.49.0
    Python: 3.9.18
This process on node 10.0.0.7 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


def test_versions_are_told_with_the_fix() -> None:
    told = explain(MISMATCH, "h:6379", "2.60.0", "3.11.7")
    assert "pip install ray==2.49.0 into a Python 3.9.18 here, or start the cluster with Ray 2.60.0 on" in told
    assert "ray start --address=h:6379 --num-cpus=0" in explain(
        "Can't find a `node_ip` …", "h:6379", "2.60.0", "3.11.7"
    )
    old, new = (
        clusters(fleet_of({}, rayClusters=[{**CLUSTERS[0], "pythonVersion": v}]), "")[0] for v in ("3.9.18", "3.11")
    )
    assert "its Python is 3.9.18, this launcher's is 3.11.7" in version_fault(old, "3.11.7")
    assert version_fault(new, "3.11.7") == "" and version_fault(new, "3.12.1") != ""


def test_what_other_hosts_must_reach() -> None:
    near = View("2.60.0", "3.11.7", (RayNode("a", "127.0.0.2", {}, {}),))
    far = View("2.60.0", "3.11.7", (RayNode("b", "10.0.0.2", {}, {}),))
    grpc = "127.0.0.1:50050"
    assert list(reach_faults({"x": near}, "127.0.0.1:0", grpc, closed=False)) == []
    told = "\n".join(reach_faults({"x": far}, "127.0.0.1:0", grpc, closed=False))
    assert all(option in told for option in ("--registry-listen", "--grpc THIS_HOST:50050", "--keys", "--insecure"))
    assert list(reach_faults({"x": far}, "10.0.0.1:0", "10.0.0.1:50050", closed=True)) == []
    assert list(reach_faults({"x": far}, "", grpc, closed=True)) == [], "a registry of its own is the operator's matter"


def test_a_view_survives_its_journey() -> None:
    view = View("2.60.0", "3.11.7", (node("1", A800, A800, "m/i"),))
    assert view_of(json.dumps(asdict(view))) == view
