"""A Docker Engine for tests: the one that runs on this machine, else one of its own for as long as the test lasts.

with docker_engine() as environ:
    subprocess.run(["docker", "compose", "up", "-d"], env=environ)

Its own needs root and apt (Debian): the programs are unpacked into the checkout, images and containers live in one
folder, and nothing stays: no process, no bridge, no packet filter rule. It has no default bridge: builds take the
host's network, projects make their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.kit.debian import NoProgram, unpacked

DATA = Path(f"/var/tmp/infermesh-docker-{os.getuid()}")
SUITE = "trixie"  # Docker Engine 26, Compose 2.26
API = (1, 44)  # of Docker Engine 25, which `start_interval` needs
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
START_S, STOP_S = 30, 60


class NoDocker(Exception):
    """None runs here and none can be started; the message says why."""


@contextlib.contextmanager
def docker_engine(*, keep: bool = False) -> Iterator[dict[str, str]]:
    """Yields the environment for `docker`. `keep`: images of its own engine stay in DATA for the next run.

    Raises:
        NoDocker: none runs here, and one cannot be started.
    """
    if runs_here(os.environ):
        yield dict(os.environ)
        return
    if os.getuid() != 0:
        raise NoDocker("no Docker Engine 25 with compose and buildx runs here, and starting one needs root")
    try:
        programs = _programs()
    except NoProgram as why:
        raise NoDocker(f"no Docker Engine 25 with compose and buildx runs here; {why}") from None
    forwarding = FORWARDING.read_text()
    # Were it off, dockerd would turn it on and drop everything else that is forwarded.
    FORWARDING.write_text("1")
    with contextlib.ExitStack() as undo:
        undo.callback(FORWARDING.write_text, forwarding)
        undo.callback(_remove_rules)
        if not keep:
            undo.callback(shutil.rmtree, DATA, ignore_errors=True)
            undo.callback(_told, ["umount", str(DATA / "data")], os.environ)  # dockerd binds its folder to itself
        yield _started(programs, undo)


def runs_here(environ: os._Environ[str] | dict[str, str]) -> bool:
    """Whether `docker` reaches an engine that is new enough, with its two plug-ins."""
    if not shutil.which("docker", path=environ.get("PATH")):
        return False
    api = _told(["docker", "version", "--format", "{{.Server.APIVersion}}"], environ).strip()
    numbers = tuple(int(part) for part in api.split(".")) if api.replace(".", "").isdigit() else ()
    return numbers >= API and all(_told(["docker", tool, "version"], environ) for tool in ("compose", "buildx"))


def _programs() -> list[Path]:
    """Folders for PATH."""
    engine = unpacked("docker", ["docker.io", "docker-cli", "docker-buildx", "docker-compose"], suite=SUITE)
    below = unpacked("containerd", ["containerd", "runc", "tini"])
    return [root / folder for root in (engine, below) for folder in ("usr/sbin", "usr/bin")]


def _started(programs: list[Path], undo: contextlib.ExitStack) -> dict[str, str]:
    run, plugins = DATA / "run", DATA / "config" / "cli-plugins"
    shutil.rmtree(run, ignore_errors=True)
    for folder in (run, plugins):
        folder.mkdir(parents=True, exist_ok=True)
    for tool in ("compose", "buildx"):
        plugin = plugins / f"docker-{tool}"
        plugin.unlink(missing_ok=True)
        plugin.symlink_to(programs[0].parent / "libexec" / "docker" / "cli-plugins" / f"docker-{tool}")
    socket = f"unix://{run}/docker.sock"
    environ = dict(os.environ) | {
        "PATH": os.pathsep.join([*map(str, programs), os.environ["PATH"]]),
        "DOCKER_HOST": socket,
        "DOCKER_CONFIG": str(plugins.parent),
    }
    words = ["dockerd", "--host", socket, "--data-root", str(DATA / "data"), "--exec-root", str(run / "exec")]
    words += ["--pidfile", str(run / "pid"), "--bridge", "none", "--init-path", str(programs[3] / "tini-static")]
    with (run / "log").open("wb") as log:
        process = subprocess.Popen(words, env=environ, stdout=log, stderr=log, start_new_session=True)
    undo.callback(_stop, process)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if runs_here(environ):
            return environ
        time.sleep(0.2)
    raise NoDocker(f"dockerd does not come up: {(run / 'log').read_text(errors='replace')[-1500:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)  # it stops its containers and its containerd
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _remove_rules() -> None:
    """dockerd leaves its chains behind."""
    for program in ("iptables", "ip6tables"):
        for table in ("nat", "filter"):
            rules = _told([program, "-t", table, "-S"], os.environ).splitlines()
            for rule in rules:
                if rule.startswith("-A ") and "DOCKER" in rule:
                    _told([program, "-t", table, "-D", *rule.split()[1:]], os.environ)
            for rule in rules:
                if rule.startswith("-N DOCKER"):
                    _told([program, "-t", table, "-X", rule.split()[1]], os.environ)


def _told(words: list[str], environ: os._Environ[str] | dict[str, str]) -> str:
    """What it prints; nothing when it fails."""
    done = subprocess.run(words, env=dict(environ), capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else ""
