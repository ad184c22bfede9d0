"""`infermesh up` for real: scripted LLMs, the real gateway, the embedded registry, and what is left when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

CLI = [sys.executable, "-P", "-m", "infermesh.cli"]
FLEET = """
version: 1
models:
  - {id: demo, kind: llm}
instances:
  - {id: s1, model: demo, engine: scripted, speed: {prefill_tps: 100000, step_ms: 2}, python: %(python)s}
  - {id: s2, model: demo, engine: scripted, speed: {prefill_tps: 100000, step_ms: 2}}
"""
# Stands for an engine: a process in the instance's session that nobody but `up` ends.
WITH_ENGINE = """#!/bin/sh
sleep 1000 &
echo $! >> engines
exec %s "$@"
"""


def wait_for(what: Callable[[], Any], seconds: float = 90, every: float = 0.05) -> Any:
    """What `what` returns once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {seconds} s for {what.__name__}"
        time.sleep(every)


def marked(mark: str) -> list[int]:
    """The living processes that carry the mark."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            environ = Path(f"/proc/{name}/environ").read_bytes()
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"UP_TEST_MARK={mark}".encode() in environ and state not in "ZX":
            found.append(int(name))
    return found


@dataclass
class Up:
    """One `infermesh up` in a folder of its own."""

    folder: Path
    mark: str
    process: subprocess.Popen[str]

    def run_file(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / ".infermesh/run/mesh.json").read_text()))
        except (OSError, ValueError):
            return {}

    def child(self, id: str) -> dict[str, Any]:
        return next((child for child in self.run_file().get("children", []) if child["id"] == id), {})

    def is_ready(self, *ids: str) -> bool:
        assert self.process.poll() is None, self.errors()
        return all(self.child(id).get("state") == "ready" for id in (ids or ("gateway", "s1", "s2")))

    def errors(self) -> str:
        return (self.folder / "stderr").read_text()

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "INFERMESH_GATEWAY": self.run_file()["gateway"]}
        return subprocess.run([*CLI, *words], cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def left(self) -> list[int]:
        return marked(self.mark)


@contextmanager
def up(folder: Path, fleet: str, *words: str, fleet_file: bool = True) -> Iterator[Up]:
    """Starts the mesh on ports from the OS; whatever the test does, nothing is left afterwards."""
    (folder / "fleet.yaml").write_text(fleet)
    mark = uuid.uuid4().hex
    env = {key: value for key, value in os.environ.items() if not key.startswith("INFERMESH_")}
    ports = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        process = subprocess.Popen(
            [*CLI, "up", *(("--fleet", "fleet.yaml") if fleet_file else ()), *ports, *words],
            cwd=folder,
            env={**env, "UP_TEST_MARK": mark},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            text=True,
        )
    mesh = Up(folder, mark, process)
    try:
        yield mesh
    finally:
        process.kill()
        process.wait()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def wrapper(folder: Path, text: str, name: str = "python.sh") -> str:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def engines(folder: Path) -> list[int]:
    path = folder / "engines"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_mesh_from_start_to_end(tmp_path: Path) -> None:
    python = wrapper(tmp_path, WITH_ENGINE % sys.executable)
    with up(tmp_path, FLEET % {"python": python}) as mesh:
        wait_for(mesh.is_ready)
        wait_for(lambda: "Ctrl-C stops it" in (tmp_path / "stdout").read_text())
        out = (tmp_path / "stdout").read_text()

        # What is printed is true: addresses, models, and a line to paste that answers.
        run = mesh.run_file()
        assert run["gateway"] in out and f"http://{run['http']}/v1" in out and "demo" in out and run["registry"] in out
        line = next(line for line in out.splitlines() if "curl" in line)
        url, body = line.split()[1], line.partition("-d '")[2].rstrip("'")
        request = urllib.request.Request(url, body.encode(), {"content-type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"].startswith(" w0 w1")
            assert reply.headers["x-infermesh-instance-id"] in ("s1", "s2")

        def both() -> list[dict[str, Any]]:
            found = json.loads(mesh.cli("instances", "--json").stdout)
            return found if {row["state"] for row in found} == {"healthy"} and len(found) == 2 else []

        rows = {row["id"]: row for row in wait_for(both)}
        assert {id: row["pid"] for id, row in rows.items()} == {id: mesh.child(id)["pid"] for id in ("s1", "s2")}
        assert rows["s1"]["speed"] == {"prefill_tps": 100000.0, "step_ms": 2.0, "source": "declared"}
        told = mesh.cli("chat", "--json", "--max-tokens", "3", "hello")
        assert json.loads(told.stdout)["choices"][0]["content"] == " w0 w1 w2", told.stderr

        # kill -9: the engine that it leaves goes too, another life begins, and nobody noticed.
        before, engine = mesh.child("s1")["pid"], engines(tmp_path)[0]
        assert alive(engine)
        os.kill(before, signal.SIGKILL)
        for _ in range(5):
            assert mesh.cli("chat", "--max-tokens", "1", "hello").returncode == 0
        wait_for(lambda: mesh.child("s1")["pid"] not in (0, before) and mesh.is_ready())
        assert not alive(engine) and len(engines(tmp_path)) == 2
        assert "[s1] ended with signal 9; starting again" in mesh.errors()
        wait_for(both)

        # Ctrl-C ends all of it.
        assert len(mesh.left()) >= 5  # up, its guard, gateway, s1 with its engine, s2
        mesh.signal(signal.SIGINT)
        assert mesh.process.wait(30) == 0, mesh.errors()
        assert mesh.left() == [] and mesh.run_file() == {}


def test_nothing_is_left_when_up_itself_is_killed(tmp_path: Path) -> None:
    python = wrapper(tmp_path, WITH_ENGINE % sys.executable)
    with up(tmp_path, FLEET % {"python": python}, "--grace-s", "2") as mesh:
        wait_for(mesh.is_ready)
        mesh.signal(signal.SIGKILL)
        mesh.process.wait()
        wait_for(lambda: not mesh.left(), 20)
        assert not alive(engines(tmp_path)[0])


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    stubborn = wrapper(tmp_path, f"#!/bin/bash\ntrap '' TERM\n{sys.executable} \"$@\" &\nwait\nwait\nsleep 1000\n")
    # Its leader is the shell, so the ready file, which names the process inside, is not believed.
    with up(tmp_path, FLEET % {"python": stubborn}, "--grace-s", "60") as mesh:
        wait_for(lambda: mesh.is_ready("gateway", "s2"))
        mesh.signal(signal.SIGTERM)
        wait_for(lambda: "Ctrl-C again" in mesh.errors())
        wait_for(lambda: mesh.child("s1") and "[gateway] has left" in mesh.errors())
        time.sleep(1)
        assert mesh.process.poll() is None, "it waits for the stubborn one"
        mesh.signal(signal.SIGTERM)
        assert mesh.process.wait(30) == 0
        assert mesh.left() == []


def test_one_that_cannot_start_is_given_up_and_the_rest_serves(tmp_path: Path) -> None:
    broken = wrapper(tmp_path, "#!/bin/sh\necho 'out of memory, buy a bigger card'\nexit 1\n")
    with up(tmp_path, FLEET % {"python": broken}) as mesh:
        wait_for(lambda: mesh.child("s1").get("state") == "failed")
        wait_for(lambda: mesh.is_ready("gateway", "s2"))
        assert "[s1] | out of memory, buy a bigger card" in mesh.errors()
        assert "[s1] ended with exit code 1 and is given up" in mesh.errors()
        assert mesh.cli("chat", "--max-tokens", "1", "hello").returncode == 0


def test_nothing_that_can_start_ends_it(tmp_path: Path) -> None:
    broken = wrapper(tmp_path, "#!/bin/sh\nexit 2\n")
    fleet = (FLEET % {"python": broken}).rpartition("  - {id: s2")[0]
    with up(tmp_path, fleet) as mesh:
        assert mesh.process.wait(30) == 1
        assert "the mesh cannot run" in mesh.errors() and mesh.left() == []


def test_a_drained_instance_stays_away(tmp_path: Path) -> None:
    with up(tmp_path, FLEET % {"python": sys.executable}) as mesh:
        wait_for(mesh.is_ready)
        assert wait_for(lambda: mesh.cli("drain", "s1").returncode == 0)
        wait_for(lambda: mesh.child("s1")["state"] == "stopped")
        time.sleep(1)
        assert mesh.child("s1")["state"] == "stopped" and mesh.is_ready("gateway", "s2")


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        (("kind: llm", "kind: llm, sorce: x"), (), "models[0].sorce: unknown key; did you mean `source`?"),
        (("kind: llm", "kind: llm, fallback: demo"), (), "models[0].fallback: a model is no fallback of itself"),
        (("engine: scripted, speed", "engine: vllm, speed"), (), "models[0].source: engine vllm needs"),
        (("kind: llm", "kind: llm, dtype: fp16"), (), "models[0].dtype: engine scripted of s1 does not take it"),
        (("version: 1", "version: 1\nnodes: [{name: a}, {name: b}]"), (), "--node a | b"),
        (
            ("version: 1", "version: 1\nregistry: consul://127.0.0.1:1"),
            ("--node", "x"),
            "--node 'x' is not in the fleet",
        ),
        (("id: s2", "id: s2, python: /nonexistent"), (), "s2: its interpreter /nonexistent is not there"),
        (("version: 1", "version: 1"), ("--keys", "/nonexistent"), "--operator-key-file"),
    ],
)
def test_a_fleet_that_cannot_be_started_ends_with_2(
    tmp_path: Path, change: tuple[str, str], words: tuple[str, ...], expected: str
) -> None:
    with up(tmp_path, (FLEET % {"python": sys.executable}).replace(*change), *words) as mesh:
        assert mesh.process.wait(30) == 2, mesh.errors()
        assert expected in mesh.errors() and "Traceback" not in mesh.errors()
        assert (tmp_path / "stdout").read_text() == "" and mesh.left() == []


def test_a_missing_model_folder_ends_with_2(tmp_path: Path) -> None:
    fleet = "version: 1\nmodels: [{id: m, kind: llm, source: ./nowhere}]\ninstances: [{id: i, model: m}]\n"
    with up(tmp_path, fleet) as mesh:
        assert mesh.process.wait(30) == 2
        assert "models[0].source: ./nowhere is not there" in mesh.errors()


def test_a_port_that_is_taken_ends_with_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words in (("--grpc", f"127.0.0.1:{port}"), ("-p", str(port))):
            with up(tmp_path, FLEET % {"python": sys.executable}, *words) as mesh:
                assert mesh.process.wait(30) == 2
                assert f"cannot listen on 127.0.0.1:{port}" in mesh.errors() and "choose another one" in mesh.errors()
                assert mesh.left() == []


def test_a_second_mesh_in_one_folder_is_refused(tmp_path: Path) -> None:
    with up(tmp_path, FLEET % {"python": sys.executable}) as mesh:
        wait_for(mesh.is_ready)
        again = mesh.cli("up", "--fleet", "fleet.yaml", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
        assert again.returncode == 2 and f"a mesh runs in this folder already (pid {mesh.process.pid})" in again.stderr


def test_running_servers_are_adopted(tmp_path: Path) -> None:
    """The REST door of one mesh is an OpenAI-speaking server to another."""
    for name in ("below", "above"):
        (tmp_path / name).mkdir()
    with up(tmp_path / "below", FLEET % {"python": sys.executable}) as below:
        wait_for(below.is_ready)
        url = f"http://{below.run_file()['http']}"
        with up(tmp_path / "above", "", "--adopt", f"{url}/v1", fleet_file=False) as above:
            wait_for(lambda: above.is_ready("gateway", "adopted-1"))
            told = wait_for(lambda: json.loads(above.cli("instances", "--json").stdout))
            assert [(row["id"], row["model"], row["state"]) for row in told] == [("adopted-1", "demo", "healthy")]
            answer = above.cli("chat", "--max-tokens", "3", "hello")
            assert answer.stdout == " w0 w1 w2\n", answer.stderr


def test_keys_and_certificates_hold_for_the_whole_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    def entry(key: str, role: str) -> str:
        return f"  - {{sha256: {hashlib.sha256(key.encode()).hexdigest()}, tenant: {role}, role: {role}}}\n"

    (tmp_path / "keys.yaml").write_text("version: 1\nkeys:\n" + entry("sk-1", "client") + entry("sk-op", "operator"))
    (tmp_path / "operator.key").write_text("sk-op\n")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own = authority.issue_cert("127.0.0.1")
    inside = authority.issue_cert("mesh.internal")
    for one, folder in ((own, "door"), (inside, "inside")):
        (tmp_path / folder).mkdir()
        one.cert_chain_pems[0].write_to_path(tmp_path / folder / "tls.crt")
        one.private_key_pem.write_to_path(tmp_path / folder / "tls.key")
        authority.cert_pem.write_to_path(tmp_path / folder / "ca.crt")
    tls = """
tls:
  gateway: {name: 127.0.0.1, folder: door}
  instances: {name: mesh.internal, folder: inside}
"""
    words = ("--keys", "keys.yaml", "--operator-key-file", "operator.key")
    with up(tmp_path, FLEET % {"python": sys.executable} + tls, *words) as mesh:
        wait_for(mesh.is_ready)
        (tmp_path / "client.key").write_text("sk-1")
        monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(tmp_path / "ca.pem"))
        gateway = ("--gateway", f"grpcs://{mesh.run_file()['gateway']}")
        known = ("--api-key-file", "client.key", *gateway)
        assert f"curl https://{mesh.run_file()['http']}/v1/" in (tmp_path / "stdout").read_text()
        assert mesh.cli("chat", "--max-tokens", "1", "hello", *known).returncode == 0
        instance = f"grpcs://{mesh.child('s1')['address']}"
        assert mesh.cli("health", instance, "--tls-name", "mesh.internal").returncode == 0
        refused = mesh.cli("chat", "--max-tokens", "1", "hello", *gateway)
        assert refused.returncode == 1 and "[unauthenticated]" in refused.stderr
        assert "[permission_denied]" in mesh.cli("drain", "s1", *known).stderr
        assert mesh.cli("drain", "s1", "--api-key-file", "operator.key", *gateway).returncode == 0
        wait_for(lambda: mesh.child("s1")["state"] == "stopped")


@pytest.mark.real
@pytest.mark.timeout(400)
def test_a_killed_vllm_leaves_no_engine_and_comes_back(tmp_path: Path, tiny_model: Path) -> None:
    """The engine's own process outlives its service; its memory must be free before the next one loads."""
    fleet = f"""
version: 1
models: [{{id: tiny, kind: llm, source: {tiny_model}}}]
instances:
  - {{id: s1, model: tiny, tp: 1, environment: {{VLLM_CPU_KVCACHE_SPACE: 1}}}}
"""
    with up(tmp_path, fleet) as mesh:
        wait_for(lambda: mesh.is_ready("gateway", "s1"), 150)
        words = ("chat", "--json", "--temperature", "0", "--max-tokens", "8", "hello")
        before = json.loads(wait_for(lambda: mesh.cli(*words).stdout))
        service = mesh.child("s1")["pid"]
        session = [pid for pid in mesh.left() if os.getsid(pid) == service]
        assert len(session) >= 2, "the service and its engine"
        os.kill(service, signal.SIGKILL)
        wait_for(lambda: not any(alive(pid) for pid in session), 5)
        wait_for(lambda: mesh.child("s1")["pid"] not in (0, service) and mesh.is_ready("gateway", "s1"), 150)
        after = json.loads(wait_for(lambda: mesh.cli(*words).stdout))
        assert after["choices"] == before["choices"]
        mesh.signal(signal.SIGTERM)
        assert mesh.process.wait(60) == 0 and mesh.left() == []
