"""A whole mesh as processes, for clients that know nothing of us: registry, gateway with keys, a scripted LLM, and the
real MiniLM for embedding and rerank."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.kit.embedding import EXPORTS

ROOT = Path(__file__).resolve().parents[2]
KEY, POOR_KEY = "sk-test-all", "sk-test-poor"  # the poor one may spend 20 tokens a minute
START_S = 180


@dataclass(frozen=True)
class Served:
    """`url` is the REST address without a path."""

    url: str
    grpc: str


@contextmanager
def served_mesh(folder: Path) -> Iterator[Served]:
    """Runs it until the end of the block; every part must leave well then."""
    keys = folder / "keys.yaml"
    entries = [
        {"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "tenant": "all"},
        {"sha256": hashlib.sha256(POOR_KEY.encode()).hexdigest(), "tenant": "poor", "tokens_per_minute": 20},
    ]
    keys.write_text(yaml.safe_dump({"version": 1, "keys": entries}))
    with ExitStack() as stack:
        begin = [stack, folder]
        registry = _start(*begin, "registry", "--listen", "127.0.0.1:0")()
        address = ("--registry", f"mesh://{registry['address']}")
        local = (*address, "--listen", "127.0.0.1:0", "--grace-s", "2")
        encoder = (*local, "--export-dir", str(EXPORTS))
        speed = ("--prefill-tps", "1e6", "--step-ms", "1")
        started = [
            _start(*begin, "gateway", *address, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--keys", str(keys)),
            _start(*begin, "llm", "--engine", "scripted", "--model", "chat", *speed, *local),
            _start(*begin, "embedding", *encoder),
            _start(*begin, "rerank", *encoder),
        ]
        gateway, *_ = [wait() for wait in started]
        served = Served(f"http://{gateway['http']}", gateway["grpc"])
        _until_ready(served.url)
        yield served


def _start(stack: ExitStack, folder: Path, *words: str) -> Callable[[], dict[str, Any]]:
    """Starts a process; the result waits for what it tells when it serves."""
    ready, log = folder / f"{words[0]}.json", folder / f"{words[0]}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "infermesh.cli", *words, "--ready-file", str(ready)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    stack.callback(_stop, process, log)

    def wait() -> dict[str, Any]:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()[-4000:])
            time.sleep(0.02)
        told: dict[str, Any] = json.loads(ready.read_text())
        return told

    return wait


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    process.terminate()
    try:
        code = process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    assert code == 0, log.read_text()[-4000:]


def _until_ready(url: str) -> None:
    """All three kinds are listed."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"authorization": f"Bearer {KEY}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 20
    while True:
        with direct.open(request, timeout=5) as answer:
            kinds = {model["kind"] for model in json.load(answer)["data"]}
        if kinds == {"llm", "embedding", "rerank"}:
            return
        assert time.monotonic() < deadline, f"only {kinds} are there"
        time.sleep(0.05)
