"""Reading what children wrote: the last words of a dead one, and how far a loading one has come."""

from __future__ import annotations

import json
from pathlib import Path

TAIL_BYTES = 32 << 10
KEPT = 3  # logs of earlier runs


def rotate(path: Path) -> None:
    """x.log -> x.log.1 -> x.log.2 …, so that this run starts an empty one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(KEPT, 0, -1):
        older = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{number}"))


def tail(path: Path, lines: int) -> list[str]:
    """The last lines, readable."""
    try:
        with path.open("rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - TAIL_BYTES))
            text = handle.read().decode("utf-8", "replace")
    except OSError:
        return []
    # A progress bar overwrites its own line; only what it says last is of interest.
    found = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [readable(line) for line in found if line.strip()][-lines:]


def readable(line: str) -> str:
    """A JSON log line as a person reads it; other lines as they are."""
    try:
        entry = json.loads(line)
        event = entry.pop("event")
    except (ValueError, KeyError, TypeError, AttributeError):
        return line
    left = {key: value for key, value in entry.items() if key not in ("timestamp", "logger", "instance", "kind")}
    level = left.pop("level", "")
    if event == "loading" and "step" in left:
        return str(left["step"])
    told = " ".join(f"{key}={value}" for key, value in left.items())
    return (
        f"{level}: {event} {told}".strip(": ")
        if level in ("error", "critical", "warning")
        else f"{event} {told}".strip()
    )
