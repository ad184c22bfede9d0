"""The parts of `up` that decide: the default fleet, adoption, logs, sessions, addresses."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.fleet import Fleet
from deploy.launch import defaults, examine, logs, run_file, sessions
from deploy.launch.adopt import Found, adopted_fleet, model_id, probe
from deploy.launch.commands import Host, start_faults
from deploy.launch.defaults import choose_llm, default_fleet
from deploy.launch.host import bind_fault, hub_fault

HOST = Host("/python", "/llm/python", 0, {})
TINY = Path("tiny")


def choose(asked: str = "", fault: str = "", cached: bool = False, host: Host = HOST) -> Any:
    return choose_llm(host, asked, lambda: fault, lambda *asked: cached, TINY)


def test_the_default_llm() -> None:
    fetched = choose()
    assert (fetched.source, fetched.revision) == (defaults.LLM_SOURCE, defaults.LLM_REVISION)
    assert len(fetched.revision) == 40 and "about 1 GB" in fetched.notes[0]
    tiny = choose(fault="no route")
    assert tiny.source == "tiny" and "NOISE" in " ".join(tiny.notes) and "--llm-source" in " ".join(tiny.notes)
    assert "no route" in tiny.notes[0]
    assert choose(fault="no route", cached=True).offline, "what is on the disk needs no hub"
    assert choose("Qwen/Qwen2.5-7B-Instruct", fault="x").model == "qwen2.5-7b-instruct"
    assert choose(host=Host("/python", "", 0, {})) is None


def test_the_default_fleet_is_whatever_is_there() -> None:
    full = default_fleet(choose(fault="x"), "/minilm", gpu=False)
    assert [(full.model(item.model).kind, full.engine_of(item)) for item in full.instances] == [
        ("llm", "vllm"),
        ("embedding", "sentence-transformers"),
        ("rerank", "sentence-transformers"),
    ]
    assert full.instances[0].environment == {"VLLM_CPU_KVCACHE_SPACE": "1"} and full.instances[0].tp == 1
    assert default_fleet(choose(), "/minilm", gpu=True).instances[0].environment == {}
    assert default_fleet(choose(cached=True), "", gpu=True).instances[0].environment == {"HF_HUB_OFFLINE": "1"}
    assert [item.id for item in default_fleet(None, "/minilm", gpu=False).instances] == ["embedding-1", "rerank-1"]
    for fleet in (full, default_fleet(choose(), "", gpu=True)):
        assert list(start_faults(fleet, 8)) == [] and Fleet.model_validate(fleet.model_dump()) == fleet


def test_two_greedy_instances_on_several_gpus_are_not_guessed() -> None:
    models = ({"id": "m", "kind": "llm", "source": "s"},)
    instances = ({"id": "a", "model": "m"}, {"id": "b", "model": "m"})
    fleet = Fleet.model_validate({"version": 1, "models": models, "instances": instances})
    assert [str(fault) for fault in start_faults(fleet, 8)] == [
        f"instances[{index}].cards: say which of the 8 GPUs each vLLM instance gets" for index in (0, 1)
    ]
    assert list(start_faults(fleet, 1)) == [], "they can share one, by vram_ratio"


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.headers.get("authorization") == "Bearer sk-1"
        models = [{"id": "qwen"}, {"id": "bge", "kind": "embedding"}, {"id": "/models/llama-3/"}]
        body = json.dumps({"data": models} if known else {"error": "x"}).encode()
        self.send_response((200 if known else 401) if self.path == "/v1/models" else 404)
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


def test_a_running_server_is_asked_for_its_models(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # for the internet, not for the mesh
    expected = [Found(server, "qwen"), Found(server, "/models/llama-3/")]
    for url in (server, server + "/", server + "/v1", server + "/v1/"):
        assert probe(url, "sk-1") == expected
    with pytest.raises(ValueError, match="answers 401; give --adopt-key-file"):
        probe(server)


def test_adopted_servers_become_a_fleet() -> None:
    answers = {"a": [Found("a", "qwen")], "b": [Found("b", "qwen"), Found("b", "/models/llama-3")]}
    fleet = adopted_fleet(["a", "b"], "key", answers.__getitem__)
    assert [model.id for model in fleet.models] == ["qwen", "llama-3"]
    assert [(item.model, item.url, item.upstream_model) for item in fleet.instances] == [
        ("qwen", "a", "qwen"),
        ("qwen", "b", "qwen"),
        ("llama-3", "b", "/models/llama-3"),
    ]
    assert list(start_faults(fleet)) == [] and all(item.api_key_file == "key" for item in fleet.instances)

    def broken(url: str) -> list[Found]:
        raise ValueError(f"{url} is gone")

    with pytest.raises(ValueError, match="a is gone\nb is gone"):
        adopted_fleet(["a", "b"], "", broken)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("qwen2.5:14b", "qwen2.5:14b"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("/opt/models/llama/", "llama"),
        ("./m.gguf", "m.gguf"),
        ("a b?c", "a-b-c"),
        ("///", "model"),
    ],
)
def test_names_of_adopted_models(name: str, id: str) -> None:
    assert model_id(name) == id


def test_logs_are_rotated_and_their_end_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    for life in range(5):
        logs.rotate(path)
        path.write_text(f"life {life}\n")
    assert [logs.tail(tmp_path / name, 1) for name in ("a.log", "a.log.1", "a.log.3", "a.log.4")] == [
        *(["life 4"], ["life 3"], ["life 1"], [])
    ]
    path.write_bytes(
        b'{"event": "loading", "step": "reading weights", "level": "info", "timestamp": "t"}\n'
        b'{"event": "cannot run", "error": "no card", "level": "error", "kind": "llm"}\n'
        b"10%\r50%\r100% done\n\xff not utf-8\n[1]\n\n"
    )
    assert logs.tail(path, 9) == [
        *("reading weights", "error: cannot run error=no card", "100% done", "\ufffd not utf-8", "[1]")
    ]
    path.write_text("x" * 100_000 + "\nlast\n")
    assert logs.tail(path, 1) == ["last"] and logs.tail(tmp_path / "none", 3) == []


def test_a_session_is_found_and_swept() -> None:
    """A leader that is dead and reaped, a child of its that is not."""
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True)"
    leader = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    orphan = int(leader.stdout.readline())
    leader.wait()
    leader.stdout.close()
    assert sessions.members(leader.pid) == [orphan] and sessions.born(orphan) and not sessions.born(leader.pid)
    started = time.monotonic()
    assert sessions.sweep(leader.pid) == [] and time.monotonic() - started < 4  # 5 s are for those who do not die
    assert sessions.members(leader.pid) == []
    sessions.terminate(leader.pid)  # gone already: no error


def test_the_guard_ends_what_it_was_told_of_when_its_pipe_closes() -> None:
    guard_path = Path(sessions.__file__).with_name("guard.py")
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True); time.sleep(100)"
    polite = "import time; print('x', flush=True); time.sleep(100)"
    children = [
        subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, start_new_session=True)
        for text in (stubborn, polite, polite)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == b"x\n"
    guard = subprocess.Popen([sys.executable, "-I", "-S", str(guard_path), "0.5"], stdin=subprocess.PIPE)
    told = "".join(f"+{child.pid}\n" for child in children) + f"-{children[2].pid}\n"
    reaper = threading.Thread(target=lambda: [child.wait() for child in children[:2]])
    reaper.start()
    guard.communicate(told.encode(), timeout=20)
    reaper.join(10)
    assert guard.returncode == 0
    assert [child.poll() for child in children] == [-signal.SIGKILL, -signal.SIGTERM, None], (
        "one was taken off the list"
    )
    children[2].kill()
    for child in children:
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_the_run_file_of_a_dead_mesh_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "mesh.json"
    own = run_file.Run(
        os.getpid(), sessions.born(os.getpid()), "g", "h", "r", (run_file.ChildLine("a", "llm", 1, "", "", ""),)
    )
    run_file.write_run_file(own, path)
    assert run_file.read_run_file(path) == own
    run_file.write_run_file(run_file.Run(os.getpid(), "1", "g", "h", "r", ()), path)
    assert run_file.read_run_file(path) is None, "the number is another process's by now"
    path.write_text("{")
    assert run_file.read_run_file(path) is None and run_file.read_run_file(tmp_path / "none") is None


def test_a_taken_address_is_seen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "in use" in bind_fault(f"127.0.0.1:{taken.getsockname()[1]}")
    assert bind_fault("127.0.0.1:0") == "" and bind_fault("203.0.113.7:0") != ""
    for address in ("8000", "localhost", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536", ""):
        assert "HOST:PORT" in bind_fault(address)


def test_the_hub_probe_is_bounded_and_obeys(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    for name in ("INFERMESH_OFFLINE", "HF_HUB_OFFLINE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert "switched off" in hub_fault()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)  # whatever a shell, or a library that another test loaded, has set
    for name in ("INFERMESH_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("deploy.launch.host.hub_endpoint", lambda: server)
    assert hub_fault() == "", "any answer of the hub's is one"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert "refused" in hub_fault(), "downloads would go through that proxy, too"
    monkeypatch.setattr("deploy.launch.host._probe", lambda endpoint: time.sleep(9))
    started = time.monotonic()
    assert "does not answer" in hub_fault() and time.monotonic() - started < 4


def test_a_clock_that_is_off_is_told() -> None:
    assert examine._clock("").level == "ok" and "nobody to compare" in examine._clock("").what
    assert examine._clock("Thu, 01 Jan 2015 00:00:00 GMT").level == "warn"
    assert examine._clock("yesterday").level == "ok"
