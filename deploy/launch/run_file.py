"""What `up` leaves in `.infermesh/`: logs, generated models, and `run/mesh.json` for as long as the mesh runs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.launch import sessions

HOME = Path(".infermesh")  # in the folder where `up` was called
RUN_FILE = HOME / "run" / "mesh.json"
LOGS = HOME / "logs"
MODELS = HOME / "models"
READY = HOME / "run" / "ready"
RAY = HOME / "run" / "ray"


@dataclass(frozen=True, slots=True)
class ChildLine:
    """One child as the run file shows it. `address` is empty until it is ready."""

    id: str
    kind: str
    pid: int
    address: str
    log: str
    state: str


@dataclass(frozen=True, slots=True)
class Run:
    """One mesh that runs on this host; `pid` is that of `up`, `born` tells it from a later process of that number."""

    pid: int
    born: str
    gateway: str
    http: str
    registry: str
    children: tuple[ChildLine, ...]


def write_run_file(run: Run, path: Path = RUN_FILE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(run), indent=1))
    partial.replace(path)


def read_run_file(path: Path = RUN_FILE) -> Run | None:
    """The mesh of this folder; None if there is none, or it was left behind by an `up` that is gone."""
    try:
        raw = json.loads(path.read_text())
        run = Run(**{**raw, "children": tuple(ChildLine(**line) for line in raw["children"])})
        os.kill(run.pid, 0)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return run if sessions.born(run.pid) == run.born else None
