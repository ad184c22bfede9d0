"""What `doctor` looks at on this host. Each finding is ok, warn (it works, but …) or fail, and says what to do."""

from __future__ import annotations

import asyncio
import email.utils
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.launch import host
from deploy.launch.on_ray import survey
from deploy.launch.on_ray.need import address_fault
from deploy.launch.run_file import read_run_file

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
ANSWER_S = 3.0
SKEW_S = 5.0  # a clock further off than this spoils log order, certificates and prompts with the time in them


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    level: Literal["ok", "warn", "fail"]
    what: str
    do: str = ""


def examine(*, grpc: str, http: str, registry: str, folder: Path, ray: str = "") -> Iterator[Finding]:
    """All checks, the quick ones first."""
    yield _python()
    yield _architecture()
    yield from _gpus()
    yield from _environments()
    yield _memory()
    yield _disk(folder)
    yield from _ports(grpc, http)
    yield _proxy()
    hub, date = _hub()
    yield hub
    if registry:
        consul, date_there = _registry(registry)
        yield consul
        date = date_there or date
    if ray:
        yield _ray(ray)
    yield _clock(date)


def _python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 15):
        return Finding("python", "ok", f"{version} at {sys.executable}")
    return Finding("python", "fail", version, "use Python 3.11 to 3.14: make setup PYTHON=/path/to/python3.12")


def _architecture() -> Finding:
    machine, system = platform.machine(), platform.system()
    flags = ""
    if system == "Linux" and machine == "x86_64":
        known = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        flags = next((name for name in ("avx512f", "avx2") if name in known), "no AVX2")
    what = f"{system} {machine} {flags}, {os.cpu_count()} cores".replace(" ,", ",")
    if system != "Linux":
        return Finding("machine", "warn", what, "vLLM has wheels for Linux only: adopt another server with --adopt")
    if flags == "no AVX2":
        return Finding("machine", "warn", what, "vLLM's CPU build needs AVX2; use a GPU, or --adopt")
    return Finding("machine", "ok", what)


def _gpus() -> Iterator[Finding]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding("gpu", "ok", "no NVIDIA driver: models run on the CPU")
        return
    asked = [
        tool,
        "--query-gpu=name,memory.total,memory.free,compute_cap,driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("gpu", "fail", f"nvidia-smi does not answer: {error}", "repair or reinstall the NVIDIA driver")
        return
    for number, line in enumerate(filter(None, map(str.strip, found.splitlines()))):
        name, total, free, capability, driver = (part.strip() for part in line.split(","))
        what = f"{number}: {name}, {free} of {total} MiB free, sm_{capability.replace('.', '')}, driver {driver}"
        if _number(capability) < 7.5:
            yield Finding("gpu", "warn", what, "today's vLLM builds need sm_75: serve it with llama.cpp and --adopt")
        elif _number(free) < 0.5 * _number(total):
            yield Finding("gpu", "warn", what, "another process holds its memory: nvidia-smi shows which")
        else:
            yield Finding("gpu", "ok", what)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")  # [N/A]: nothing can be said against it


def _environments() -> Iterator[Finding]:
    needed = {"gateway": "uvicorn", "embedding and rerank": "sentence_transformers"}
    for what, module in needed.items():
        if importlib.util.find_spec(module) is not None:
            yield Finding("environment", "ok", f"{what}: in {sys.prefix}")
        else:
            yield Finding("environment", "warn", f"{what}: {module} is not in {sys.prefix}", "run `make setup`")
    python = host.llm_python()
    if python:
        yield Finding("environment", "ok", f"vLLM: {python}")
    else:
        yield Finding(
            "environment", "warn", "vLLM: no .venv-llm here", "run `make setup`, or `infermesh up --adopt URL`"
        )


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    what = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    if memory.available < 4 * 2**30:
        return Finding("memory", "warn", what, "the default fleet takes about 4 GiB on a CPU: close something")
    return Finding("memory", "ok", what)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    what = f"{free:.1f} GiB free at {folder.resolve()}"
    if free < 5:
        return Finding("disk", "warn", what, "environments and a first model take about 5 GiB")
    return Finding("disk", "ok", what)


def _ports(grpc: str, http: str) -> Iterator[Finding]:
    run = read_run_file()
    for name, address, option in (("gRPC", grpc, "--grpc"), ("REST", http, "-p")):
        fault = host.bind_fault(address)
        if not fault:
            yield Finding("port", "ok", f"{address} is free ({name})")
        elif run is not None and address in (run.gateway, run.http):
            yield Finding("port", "ok", f"{address} is this folder's running mesh ({name})")
        else:
            yield Finding("port", "fail", f"{address} ({name}): {fault}", f"end what listens there, or `up {option} …`")


def _proxy() -> Finding:
    found = sorted({name.lower() for name in os.environ if name.lower() in PROXIES and os.environ[name]})
    if not found:
        return Finding("proxy", "ok", "none set")
    what = f"{', '.join(found)}: for downloads; channels inside the mesh ignore them"
    if urllib.request.getproxies().get("http") and not urllib.request.proxy_bypass("127.0.0.1"):
        do = "export no_proxy=127.0.0.1,localhost"
        return Finding("proxy", "warn", f"{what}, but curl and SDKs would ask it for 127.0.0.1 as well", do)
    return Finding("proxy", "ok", what)


def _hub() -> tuple[Finding, str]:
    """And the Date that it told."""
    fault = host.hub_fault()
    if fault:
        do = "set HF_ENDPOINT to a mirror or https_proxy to a proxy, or name a local folder with --llm-source"
        return Finding("hub", "warn", fault, do), ""
    return Finding("hub", "ok", f"{host.hub_endpoint()} answers"), _date(host.hub_endpoint())


def _registry(url: str) -> tuple[Finding, str]:
    scheme, _, rest = url.partition("://")
    if scheme not in ("consul", "consuls"):
        return Finding("registry", "warn", f"{url}: only Consul is examined"), ""
    address = f"{'https' if scheme == 'consuls' else 'http'}://{rest}/v1/status/leader"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=ANSWER_S) as reply:
            leader, date = reply.read(200).decode().strip().strip('"'), reply.headers.get("date", "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        do = "is its agent running there? consul agent -dev starts one"
        return Finding("consul", "fail", f"{address}: {reason}", do), ""
    if not leader:
        return Finding("consul", "fail", "it has no leader", "see `consul operator raft list-peers`"), date
    return Finding("consul", "ok", f"{rest}, leader {leader}"), date


def _ray(address: str) -> Finding:
    """Can this host place instances on that cluster, and what is there?"""
    try:
        if fault := address_fault(address):
            raise ValueError(f"{address}: {fault}")
        view = asyncio.run(survey.look(sys.executable, address))
    except ValueError as error:
        what, _, do = str(error).partition(": ")
        return Finding("ray", "fail", what, do or "see docs/deploy.md")
    return Finding("ray", "ok", survey.told(address, view))


def _date(url: str) -> str:
    try:
        with urllib.request.build_opener().open(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_S) as reply:
            return str(reply.headers.get("date", ""))
    except urllib.error.HTTPError as error:
        return str(error.headers.get("date", ""))
    except (OSError, ValueError):
        return ""


def _clock(date: str) -> Finding:
    """Against the Date of whoever answered."""
    if not date:
        return Finding("clock", "ok", f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}; nobody to compare it with was reached")
    try:
        skew = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return Finding("clock", "ok", f"not compared: {date!r} is no date")
    if abs(skew) > SKEW_S:
        return Finding(
            "clock", "warn", f"{skew:+.0f} s against the network", "switch time synchronisation on (chrony, ntp)"
        )
    return Finding("clock", "ok", f"within {SKEW_S:.0f} s of the network")
