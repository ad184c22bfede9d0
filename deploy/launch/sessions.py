"""Processes by session: each child of `up` leads its own, and everything that it started is in there.

A killed vLLM service leaves its engine processes, and the memory of the GPU, behind; they are found and ended here.
This file is also run by the guard without any package around it, so it imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

PROC = Path("/proc")


def members(leader: int) -> list[int]:
    """The living processes of the session that `leader` leads (it may be gone itself); without /proc, none is found."""
    found = []
    try:
        names = [name for name in os.listdir(PROC) if name.isdigit()]
    except OSError:
        return []
    for name in names:
        fields = _stat(int(name))
        if fields and int(fields[3]) == leader and fields[0] not in "ZX":
            found.append(int(name))
    return found


def born(pid: int) -> str:
    """When a process started, in the kernel's ticks: tells it from a later one of the same number. Empty: gone."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before them may hold anything."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []


def kill(leader: int) -> None:
    """SIGKILL to the session's process groups."""
    _send(os.killpg, leader)
    for pid in members(leader):
        _send(os.kill, pid)


def terminate(leader: int) -> None:
    """SIGTERM to the leader alone: an engine process obeys it too, and would be gone before its leader has drained."""
    _send(os.kill, leader, signal.SIGTERM)


def sweep(leader: int, timeout_s: float = 5.0) -> list[int]:
    """Kills the session and waits until it is empty. Blocks; returns who is still there after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        kill(leader)
        left = members(leader)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def _send(call: object, pid: int, number: int = signal.SIGKILL) -> None:
    if pid <= 0:
        return  # to the kernel, 0 is our own group
    try:
        call(pid, number)  # type: ignore[operator]
    except (ProcessLookupError, PermissionError):
        return
