"""What `up` tells the child that stands for an instance on Ray: a file, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.launch.on_ray.need import Need
from deploy.launch.on_ray.service import FOLDER


@dataclass(frozen=True, slots=True)
class Spec:
    """`ship`: path here -> name there; the files are read when the child starts, so that secrets are in no spec."""

    id: str
    model: str
    address: str  # of the Ray head
    need: Need
    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready_file: str
    lock: str
    files: Mapping[str, str] = field(default_factory=dict)
    ship: Mapping[str, str] = field(default_factory=dict)
    keep_threads: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_spec(path: Path) -> Spec:
    raw: dict[str, Any] = json.loads(path.read_text())
    return Spec(**{**raw, "need": Need(**raw["need"]), "argv": tuple(raw["argv"])})


def shipped(spec: Spec) -> dict[str, bytes]:
    """Everything that is written on the node before it starts.

    Raises:
        OSError: a file cannot be read here.
    """
    told = {name: text.encode() for name, text in spec.files.items()}
    return told | {name: Path(path).expanduser().read_bytes() for path, name in spec.ship.items()}


def there(path: str, number: int) -> str:
    """A file's name on the node; two files here may have one name."""
    return f"{FOLDER}/{number}-{Path(path).name}"
