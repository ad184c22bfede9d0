"""The ready file: tells a supervisor, in one atomic step, that a process serves and where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def tell_ready(path: Path | None, facts: Mapping[str, object]) -> None:
    """Writes the facts as JSON; a reader sees all of them or no file. None is nobody to tell."""
    if path is None:
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(facts))
    partial.replace(path)
