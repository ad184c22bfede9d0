"""What runs on a Ray node, without Ray: the service's process there, its guard, and the command line it gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.fleet import Fleet
from deploy.launch import sessions
from deploy.launch.commands import Host, Shared, TlsFiles
from deploy.launch.on_ray.cluster import group_name
from deploy.launch.on_ray.command import ray_command
from deploy.launch.on_ray.need import clusters
from deploy.launch.on_ray.service import ADDRESS, FOLDER, LLM_PYTHON, PYTHON, Launch, Service, code_of, inherited
from deploy.launch.on_ray.spec import read_spec, shipped
from deploy.launch.programs import place_of

READY = "import json, os, time; open('ready.json', 'w').write(json.dumps({'address': 'a', 'pid': os.getpid()})); "


def until(what: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_life_of_a_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("RAY_JOB_ID", "1")
    service = Service("10.0.0.2")
    script = "import os; print(open('0-key').read(), os.environ['AT'], 'RAY_JOB_ID' in os.environ, flush=True); "
    launch = Launch(
        "i",
        (PYTHON, "-c", script + READY + "time.sleep(100)"),
        {"AT": f"{ADDRESS}:0"},
        {f"{FOLDER}/0-key": b"secret"},
    )
    pid = service.start(launch)
    facts = until(lambda: service.look(0).facts)
    assert facts == {"address": "a", "pid": str(pid)}
    seen = service.look(0)
    assert (seen.pid, seen.code, seen.log) == (pid, None, b"secret 10.0.0.2:0 False\n")
    assert service.look(len(seen.log)).log == b""
    (folder,) = tmp_path.glob("infermesh-*")
    assert (folder / "0-key").stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    service.terminate()
    assert until(lambda: service.look(0).code) == -signal.SIGTERM
    assert service.end() == [] and not folder.exists()
    assert code_of(-signal.SIGTERM) == 143 and code_of(2) == 2


def test_what_a_killed_actor_leaves_is_ended(tmp_path: Path) -> None:
    """The actor's process dies with SIGKILL: its guard is nobody's child, ends the service and removes its folder."""
    script = (
        "from deploy.launch.on_ray.service import *; s = Service('h'); "
        f"print(s.start(Launch('i', (PYTHON, '-c', {READY + 'time.sleep(100)'!r}), {{}})), flush=True); "
        "import time; time.sleep(100)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    actor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env, text=True)
    assert actor.stdout is not None
    service = int(actor.stdout.readline())
    until(lambda: list(tmp_path.glob("infermesh-*/ready.json")))
    actor.kill()
    actor.wait()
    actor.stdout.close()
    until(lambda: not sessions.born(service) and not list(tmp_path.glob("infermesh-*")))


def test_the_nodes_variables_without_ours_and_rays() -> None:
    node = {
        "PATH": "/bin",
        "INFERMESH_LISTEN": "x",
        "RAY_JOB_ID": "1",
        "CUDA_VISIBLE_DEVICES": "3",
        "OMP_NUM_THREADS": "1",
    }
    assert inherited(node, Launch("i", (), {})) == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3"}
    assert inherited(node, Launch("i", (), {}, keep_threads=True))["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in inherited(node, Launch("i", (), {}, only_given_gpus=False))


def test_a_node_without_vllm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("deploy.launch.on_ray.service.llm_python", lambda: "")
    service = Service("10.0.0.2")
    with pytest.raises(FileNotFoundError, match=r"vLLM is not installed on node 10.0.0.2 .*infermesh\[llm\]"):
        service.start(Launch("i", (LLM_PYTHON, "-m", "x"), {}))
    assert service.end() == []


def command(instance: dict[str, Any], folder: Path, shared: Shared, **model: Any) -> tuple[list[str], Any]:
    models = [{"id": "m", "kind": "llm", "source": "org/m", **model}]
    nodes = [{"name": "n", "device": "H20-96G", "count": 8}]
    instances = [{"id": "i", "model": "m", "node": "n", **instance}]
    fleet = Fleet.model_validate({"version": 1, "models": models, "nodes": nodes, "instances": instances})
    place = place_of(fleet, fleet.instances[0], clusters(fleet, "10.0.0.1:6379"))
    host = Host("/here/python", "/here/llm", 0, {"PATH": "/here", "INFERMESH_DEBUG": "1"})
    made = ray_command(fleet, fleet.instances[0], host, shared, place, folder / "ready.json", {}, folder)
    assert made.argv[:4] == ("/here/python", "-P", "-m", "deploy.launch.on_ray.child")
    (path, text), *others = made.files.items()
    assert not others and made.argv[4] == str(path)
    path.write_text(text)
    spec = read_spec(path)
    return list(spec.argv), spec


def option(argv: list[str], name: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == name]


def test_the_command_line_of_a_node(tmp_path: Path) -> None:
    for name in ("keys.yaml", "op.key", "template.jinja"):
        (tmp_path / name).write_text(name)
    keys = {"keys": str(tmp_path / "keys.yaml"), "operator_key_file": str(tmp_path / "op.key")}
    shared = Shared("mesh://10.0.0.1:50049", **keys, calibration=str(tmp_path / "none.yaml"))
    argv, spec = command(
        {"cards": [4, 5, 6, 7], "environment": {"A": 1}},
        tmp_path,
        shared,
        chat_template=str(tmp_path / "template.jinja"),
    )
    assert argv[:5] == [LLM_PYTHON, "-P", "-m", "infermesh.cli", "llm"]
    assert option(argv, "--tp") == ["4"] and option(argv, "--listen") == ["{address}:0"]
    assert option(argv, "--ready-file") == ["{folder}/ready.json"] and option(argv, "--device") == ["H20-96G"]
    assert option(argv, "--calibration") == [], "there is none yet"
    assert spec.env == {"A": "1", "INFERMESH_DEBUG": "1"}, "this host's PATH is not the node's"
    there = {name: content.decode() for name, content in shipped(spec).items()}
    assert sorted(there.values()) == ["keys.yaml", "op.key", "template.jinja"]
    assert all(there[option(argv, f"--{name}")[0]] for name in ("keys", "operator-key-file", "chat-template"))
    assert "secret" not in json.dumps(spec.text()) and not spec.need.spans


def test_certificates_travel_to_the_node(tmp_path: Path) -> None:
    files = TlsFiles(str(tmp_path / "tls.crt"), str(tmp_path / "tls.key"), str(tmp_path / "ca.crt"), "mesh.internal")
    for path in (files.cert, files.key):
        Path(path).write_text(path)
    argv, spec = command({"tp": 1}, tmp_path, Shared("mesh://h:1", instances_tls=files))
    there = {name: content.decode() for name, content in shipped(spec).items()}
    told = [there[option(argv, f"--tls-{name}-file")[0]] for name in ("cert", "key")]
    assert told == [files.cert, files.key] == sorted(there.values()), "the authority is the gateway's affair"


def test_an_instance_across_hosts_uses_rays_executor(tmp_path: Path) -> None:
    argv, spec = command({"tp": 8, "pp": 2}, tmp_path, Shared("mesh://10.0.0.1:50049"))
    assert option(argv, "--tp") == ["8"] and option(argv, "--pp") == ["2"]
    assert option(argv, "--engine-arg") == ['distributed_executor_backend="ray"']
    assert spec.env["RAY_ADDRESS"] == "10.0.0.1:6379" and spec.need.hosts == 2
    assert spec.env["INFERMESH_RAY_GROUP"] == group_name("m", "i")
    own, _ = command(
        {"tp": 8, "pp": 2, "engine_args": {"distributed_executor_backend": "mp"}}, tmp_path, Shared("mesh://h:1")
    )
    assert option(own, "--engine-arg") == ['distributed_executor_backend="mp"'], "the operator has the last word"
    within, _ = command({"tp": 8}, tmp_path, Shared("mesh://h:1"))
    assert option(within, "--engine-arg") == []
