"""Programs that tests need and a machine lacks, taken out of Debian packages into the checkout. No root, nothing
installed: the packages come from the archive that this machine's own apt uses, if need be from another of its suites.

    consul = unpacked("consul", ["consul"], suite="bullseye") / "usr/bin/consul"
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

TOOLS = Path(__file__).resolve().parents[2] / ".infermesh" / "tools"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class NoProgram(Exception):
    """It is not here and cannot be fetched; the message says why."""


def not_here(why: object) -> NoReturn:
    """Ends a test for want of a program: skipped, but failed where CI promises that it is proven."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(str(why))


def unpacked(name: str, packages: Sequence[str], *, suite: str = "") -> Path:
    """The folder with the packages' files, made once a checkout. Their dependencies do not come along.

    `suite`: e.g. bullseye; empty is what this machine's apt is set to.

    Raises:
        NoProgram: there is no apt, or its archive has no such package.
    """
    folder = TOOLS / name
    if folder.exists():
        return folder
    TOOLS.mkdir(parents=True, exist_ok=True)
    with (TOOLS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at the same time
        if not folder.exists():
            _fetch(folder, packages, suite)
    return folder


def _fetch(folder: Path, packages: Sequence[str], suite: str) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise NoProgram(f"no apt-get to fetch {' '.join(packages)} with; put the program on PATH")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="infermesh-debian-") as temporary:
        work = Path(temporary)
        apt = ["apt-get", "-q", "-o", "APT::Sandbox::User="]
        if suite:
            apt += _private(work, suite)
            _run([*apt, "update"], work)
        _run([*apt, "download", *packages], work)
        for package in work.glob("*.deb"):
            _run(["dpkg", "-x", str(package), str(partial)], work)
    partial.rename(folder)


def _private(work: Path, suite: str) -> list[str]:
    """Options for lists of its own, so that it needs no root and leaves the system's apt as it is."""
    for name in ("lists/partial", "cache/archives/partial", "state"):
        (work / name).mkdir(parents=True)
    signed = f"[signed-by={KEYRING}] " if Path(KEYRING).exists() else ""
    (work / "sources.list").write_text(f"deb {signed}{_mirror()} {suite} main\n")
    options = {
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": work / "state",
        "Dir::State::Lists": work / "lists",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": work / "cache",
        "Acquire::Languages": "none",
        "Acquire::Check-Valid-Until": "false",  # an archived suite's Release file has expired
        "Acquire::AllowReleaseInfoChange": "true",
        "APT::Update::Post-Invoke-Success::": "",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def _mirror() -> str:
    """The archive that this machine's own apt uses for its first suite."""
    told = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], Path("/"))
    for line in told.splitlines():
        if "security" not in line:
            return line.strip()
    raise NoProgram("this machine's apt has no package lists (apt-get update?); or put the program on PATH")


def _run(words: list[str], cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise NoProgram(f"{words[0]} {words[-1]} failed: {(done.stderr or done.stdout)[-500:]}")
    return done.stdout
