"""Scripted engines, one router before them, and a client that keeps a trace's own times, all over loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson

from registry.endpoint import Endpoint
from tests.bench.load import watch_idle
from tests.bench.peers_trace import Ask
from tests.kit.children import Child, infermesh

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / ".venv-peers"
WARM = 64  # requests of WARM_WORDS words: connections, and what a router learns of a model before it is measured
WARM_WORDS = 200
START_S = 30.0
PATIENCE_S = 300.0  # for one answer
MODEL = "m"


@dataclass(frozen=True, slots=True)
class Router:
    """One line of the comparison. `simulated`: the policy of `sim` that stands for it."""

    package: str
    policy: str
    simulated: str

    @property
    def name(self) -> str:
        return self.package if self.package == "infermesh" else f"{self.package} {self.policy}"


@dataclass(slots=True)
class Seen:
    """One request as the client saw it. Times in seconds; `ttft` from when it was due."""

    due: float
    late: float = 0.0
    ttft: float = -1.0
    e2e: float = -1.0
    cached: int = 0
    tokens: int = 0
    fault: str = ""


@dataclass(slots=True)
class Run:
    seen: list[Seen]
    idle: list[float] = field(default_factory=list)  # share of the machine, each second: idle, or in nice work's hands


def install(package: str, version: str) -> Path:
    """The package in an environment of its own (two of them bring a script `smg`)."""
    folder = VENVS / package
    if not list(folder.glob(f"lib/*/site-packages/{package.replace('-', '_')}-{version}.dist-info")):
        uv = [sys.executable, str(ROOT / "deploy/setup/install.py"), "uv"]
        subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        wanted = f"{package}=={version}"
        subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(folder), wanted], check=True)
    return folder / "bin"


@contextmanager
def engines(folder: Path, endpoints: Sequence[Endpoint], chunk: int) -> Iterator[tuple[str, list[str]]]:
    """Fresh engines, cold caches: the registry's URL, and each engine's HTTP address."""
    with ExitStack() as stack:

        def begin(name: str, words: Sequence[str]) -> Child:
            child = Child(folder, name, words)
            stack.callback(child.destroy)
            return child

        url = f"mesh://{begin('registry', infermesh('registry', '--listen', '127.0.0.1:0')).address}"
        port = (sys.executable, "-P", "-m", "tests.kit.openai_port", "--model", MODEL, "--listen", "127.0.0.1:0")
        begun = []
        for endpoint in endpoints:
            speed, capacity = endpoint.speed, endpoint.capacity
            told = folder / f"{endpoint.id}.http.json"
            words = {
                "http-file": told,
                "instance-id": endpoint.id,
                "registry": url,
                "device": endpoint.hardware.device,
                "prefill-tps": speed.prefill_tps,
                "prefill-doubling-ctx": speed.prefill_doubling_ctx,
                "step-ms": speed.step_ms,
                "kv-us-per-ktoken": speed.kv_us_per_ktoken,
                "kv-tokens": capacity.kv_tokens,
                "max-context": capacity.context_max,
                "max-running": capacity.max_running,
                "prefill-chunk": chunk,
                "log-level": "warning",
            }
            flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
            begun.append((begin(endpoint.id, [*port, *flags]), told))
        for child, _ in begun:
            child.told(START_S)
        yield url, [f"http://{json.loads(told.read_text())['http']}" for _, told in begun]


@contextmanager
def routed(folder: Path, router: Router, version: str, registry: str, workers: Sequence[str]) -> Iterator[str]:
    """The router's HTTP address. It runs as its documentation starts it; only the policy is named."""
    if router.package == "infermesh":
        doors = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log-level", "warning")
        child = Child(folder, "gateway", infermesh("gateway", *doors, "--registry", registry))
        try:
            yield f"http://{child.told(START_S)['http']}"
        finally:
            child.destroy()
        return
    port, metrics = _free_ports(2)
    begin = {"smg": ("smg", "launch"), "vllm-router": ("vllm-router",), "sglang-router": ("smg", "launch")}
    binary, *verb = begin[router.package]
    words = [str(install(router.package, version) / binary), *verb, "--policy", router.policy]
    words += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1"]
    words += [
        "--prometheus-port",
        str(metrics),
        "--log-level",
        "warn" if router.package != "vllm-router" else "warning",
    ]
    with (folder / "router.log").open("wb") as log:
        process = subprocess.Popen(
            [*words, "--worker-urls", *workers], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


async def drive(urls: Sequence[str], asks: Sequence[Ask]) -> Run:
    """Every request at its own time, whatever became of the others; to each of `urls` in turn."""
    bodies = [_body(ask.text, ask.output) for ask in asks]
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
        for url in urls:
            await _until_served(session, url)
            await _warm_up(session, url, WARM // len(urls))
        run = Run([Seen(ask.at) for ask in asks])
        watch = asyncio.create_task(watch_idle(run.idle))
        begun = time.perf_counter() + 0.5
        await asyncio.gather(
            *(
                _one(session, urls[at % len(urls)], body, begun, seen)
                for at, (body, seen) in enumerate(zip(bodies, run.seen, strict=True))
            )
        )
        watch.cancel()
    return run


def _body(text: str, tokens: int) -> bytes:
    body = {"model": MODEL, "prompt": text, "max_tokens": tokens, "stream": True}
    return orjson.dumps(body | {"stream_options": {"include_usage": True}})


async def _one(session: aiohttp.ClientSession, url: str, body: bytes, begun: float, seen: Seen) -> None:
    due = begun + seen.due
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    seen.late = time.perf_counter() - due
    headers = {"content-type": "application/json"}
    try:
        async with session.post(f"{url}/v1/completions", data=body, headers=headers) as reply:
            if reply.status != 200:
                seen.fault = f"HTTP {reply.status}: {(await reply.text())[:200]}"
                return
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                if seen.ttft < 0:
                    seen.ttft = time.perf_counter() - due
                if b'"usage"' in line and (usage := orjson.loads(line[6:]).get("usage")):
                    seen.tokens = usage["completion_tokens"]
                    seen.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        seen.e2e = time.perf_counter() - due
        if not seen.tokens:
            seen.fault = "the stream ended without usage"
    except (TimeoutError, aiohttp.ClientError) as error:
        seen.fault = f"{type(error).__name__}: {error}"


async def _until_served(session: aiohttp.ClientSession, url: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        seen = Seen(0.0)
        await _one(session, url, _body("hello", 1), time.perf_counter(), seen)
        if not seen.fault:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"{url} does not serve after {START_S:g} s: {seen.fault}")
        await asyncio.sleep(0.1)


async def _warm_up(session: aiohttp.ClientSession, url: str, count: int) -> None:
    """Unlike prompts, four at a time."""
    left = list(range(count))

    async def client() -> None:
        while left:
            ask = Ask(0.0, (-1 - left.pop(),), WARM_WORDS, 8)
            seen = Seen(0.0)
            await _one(session, url, _body(ask.text, ask.output), time.perf_counter(), seen)
            if seen.fault:
                raise SystemExit(f"warming up: {seen.fault}")

    await asyncio.gather(*(client() for _ in range(4)))
