"""`infermesh explain --request-id` with real processes: an attempt that failed, a restart, a stranger's request."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from infermesh.client import Client
from tests.kit.children import ROOT, Child, Children, ask, environment, infermesh

KEYS = {"alice": "tenant: a", "bob": "tenant: b", "root": "tenant: o, role: operator"}


def test_a_past_request_is_explained_with_every_attempt_and_after_a_restart(tmp_path: Path) -> None:
    secrets = {name: tmp_path / f"{name}.key" for name in KEYS}
    lines = [f"  - {{sha256: {hashlib.sha256(name.encode()).hexdigest()}, {more}}}" for name, more in KEYS.items()]
    (tmp_path / "keys.yaml").write_text("\n".join(["version: 1", "keys:", *lines]))
    for name, path in secrets.items():
        path.write_text(name)
    keyed = ("--keys", str(tmp_path / "keys.yaml"))
    with Children(tmp_path) as children:
        registry = children.start("registry", "--listen", "127.0.0.1:0", *keyed)
        shared = ("--registry", f"mesh://{registry.address}", *keyed, "--operator-key-file", str(secrets["root"]))
        scripted = ("--engine", "scripted", "--model", "m", "--listen", "127.0.0.1:0")
        # The faster one is chosen first and breaks after its first token.
        children.start("llm", *scripted, "--instance-id", "bad", *shared, "--prefill-tps", "9000",
                       "--fail-after-tokens", "1", name="bad")  # fmt: skip
        children.start("llm", *scripted, "--instance-id", "good", *shared, "--prefill-tps", "1000", name="good")
        past = ("--explain-dir", str(tmp_path / "past"), "--id", "gw")
        options = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *past, *shared)
        gateway = children.start("gateway", *options)
        healthy(gateway, secrets["root"], 2)
        served = chat(gateway, "alice", "ask-1")
        assert served["x-infermesh-attempts"] == "2" and served["x-infermesh-instance-id"] == "good"

        def explain(who: str, id: str, *more: str, code: int = 0) -> str:
            at = ("--gateway", gateway.address, "--api-key-file", str(secrets[who]))
            return ask("explain", "--request-id", id, *at, *more, code=code)

        found = json.loads(explain("alice", "ask-1", "--json"))
        assert [(one["chosen"], one["outcome"]) for one in found["decisions"]] == [
            ("bad", "engine_failed"),
            ("good", "ok"),
        ]
        assert found["chosen"] == "good" and {"id": "bad", "reason": "excluded"} in found["rejected"]
        assert found["request"]["tenant"] == "a" and found["request"]["ttft_s"] > 0
        assert "word-nobody-may-see" not in json.dumps(found)
        gateway = children.start("gateway", *options)  # the first one ends here
        healthy(gateway, secrets["root"], 2)
        assert json.loads(explain("root", "ask-1", "--json")) == found
        text = explain("alice", "ask-1")
        for part in ("decision 1 of 2, which ended as engine_failed", "->  good", "rejected bad: excluded (an attempt"):
            assert part in text, text
        for who, id in (("bob", "ask-1"), ("alice", "ask-2")):
            done = subprocess.run(
                infermesh("explain", "--request-id", id, "--gateway", gateway.address, "--api-key-file", secrets[who]),
                cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90, check=False,
            )  # fmt: skip
            assert done.returncode == 1 and "ask the one that served it with --gateway" in done.stderr, done.stderr
        # Gateways share nothing, but all that are named are asked.
        other = ("--grpc", "127.0.0.1:0", "--http", "", "--explain-dir", str(tmp_path / "past"), "--id", "gw2")
        second = children.start("gateway", *other, *shared, name="gw2")
        for order in ((second, gateway), (gateway, second)):
            at = ("--gateway", ",".join(one.address for one in order), "--api-key-file", str(secrets["root"]))
            assert json.loads(ask("explain", "--request-id", "ask-1", "--json", *at)) == found
        at = ("--gateway", gateway.address, "--api-key-file", str(secrets["alice"]))
        ask("record", "-o", str(tmp_path / "trace.jsonl"), *at, code=1)
        assert not (tmp_path / "trace.jsonl").exists(), "traffic is the operator's to record"
        files = list((tmp_path / "past").rglob("*.jsonl"))
        assert files and not any(b"word-nobody-may-see" in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--explain-dir", "/proc/nowhere"), "explain_dir: /proc/nowhere/gateway-0: "),
        (("--explain-mib", "-1"), "explain_mib: "),
    ],
)
def test_a_folder_that_cannot_be_used_is_told_at_once(flags: tuple[str, ...], told: str) -> None:
    command = infermesh("gateway", "--grpc", "127.0.0.1:0", "--http", "", *flags)
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 2 and told in done.stderr


def healthy(gateway: Child, key: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    with Client(gateway.address, api_key=key.read_text(), timeout=10) as mesh:
        while sum(one.state == "healthy" for one in mesh.instances()) != count:
            assert time.monotonic() < deadline, gateway.text()
            time.sleep(0.05)


def chat(gateway: Child, key: str, id: str) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": "word-nobody-may-see"}], "max_tokens": 4}
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json", "x-request-id": id}
    url = f"http://{gateway.told()['http']}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.headers
