"""The real LLM service for tests: vLLM on a tiny noise model, in a process of the interpreter that has vLLM.

Starting costs some 20 s on two cores, so `vllm_service` is one for the whole session.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import pytest

from infermesh.transport import channel_options
from tests.kit.children import environment
from tests.kit.llm_client import MODEL, Client

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-llm" / "bin" / "python"
CONTEXT = 4096
BLOCK = 32  # tokens; what a prefix cache hit is a multiple of
START_S = 150.0


class LlmProcess:
    """`infermesh llm --engine vllm` as a child in its own session. Leaves no process behind."""

    def __init__(self, folder: Path, source: Path, *flags: str) -> None:
        self.log = folder / "llm.log"
        self._ready = folder / "llm.json"
        self._ready.unlink(missing_ok=True)
        arguments = [
            *(str(PYTHON), "-P", "-m", "infermesh.cli", "llm", "--engine", "vllm", "--model", MODEL),
            *("--source", str(source), "--max-context", str(CONTEXT), "--engine-arg", f"block_size={BLOCK}"),
            *("--listen", "127.0.0.1:0", "--ready-file", str(self._ready), "--grace-s", "2", *flags),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> str:
        """Its address."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self._ready.exists():
                self.children()
                return str(json.loads(self._ready.read_text())["address"])
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}\n{self.log.read_text()[-4000:]}")
            time.sleep(0.1)
        raise AssertionError(f"not ready after {START_S} s\n{self.log.read_text()[-4000:]}")

    def children(self) -> list[psutil.Process]:
        """Every process that it started and that still lives, orphans included."""
        try:
            for child in psutil.Process(self.pid).children(recursive=True):
                self._seen[child.pid] = child
        except psutil.NoSuchProcess:
            pass
        return [child for child in self._seen.values() if _lives(child)]

    def engine_core(self) -> psutil.Process:
        return next(child for child in self.children() if "EngineCore" in " ".join([child.name(), *child.cmdline()]))

    def close(self) -> int:
        """SIGTERM, then whatever it takes."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for child in self.children():
            child.kill()
        return self.process.returncode


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Any, timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def llm_python(*arguments: str, timeout_s: float = 150.0, **given: Any) -> str:
    """Runs the interpreter that has vLLM and returns what it prints on stdout."""
    done = subprocess.run(
        [str(PYTHON), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **given,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON.exists():
        pytest.fail("no .venv-llm here: run `make setup`")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llm_python("-P", "-m", "services.llm.tiny_model", str(folder))
    return folder


@pytest.fixture(scope="session")
def vllm_service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a service with vLLM, a tool parser (hermes) and a reasoning parser (qwen3)."""
    flags = ("--tool-parser", "hermes", "--reasoning-parser", "qwen3", "--max-running", "128", "--max-waiting", "64")
    service = LlmProcess(tmp_path_factory.mktemp("vllm"), tiny_model, *flags)
    try:
        yield service.wait_ready()
    finally:
        service.close()


@pytest.fixture
async def vllm(vllm_service: str) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(vllm_service, options=channel_options()) as channel:
        yield Client(channel)
