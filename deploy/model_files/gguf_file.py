"""The headers of a GGUF model's files, read with the `gguf` package. Weights are mapped, not loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deploy.planner.config_json import Unreadable
from deploy.planner.gguf_header import shape_of_gguf
from deploy.planner.shape import Shape

_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
LONGEST_LIST = 4096  # a vocabulary is not looked at


def read_gguf(path: Path) -> Shape:
    """The model that a file belongs to; of a split one any part may be named.

    Raises:
        Unreadable: a file is missing or no GGUF.
    """
    metadata: dict[str, Any] = {}
    tensors: list[tuple[str, float, float]] = []
    for part in _parts(path):
        keys, found = _read(part)
        metadata = {**keys, **metadata}
        tensors += found
    try:
        return shape_of_gguf(metadata, tensors, path.name)
    except Unreadable as error:
        raise Unreadable(f"{path}: {error}") from None


def _parts(path: Path) -> list[Path]:
    match = _PART.match(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.exists()]:
        raise Unreadable(f"{path}: {len(missing)} of {count} parts are missing beside it: {', '.join(missing[:3])}")
    return parts


def _read(path: Path) -> tuple[dict[str, Any], list[tuple[str, float, float]]]:
    from gguf import GGUFReader

    if not path.is_file():
        raise Unreadable(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the package raises whatever its array arithmetic meets in a broken file
        raise Unreadable(f"{path}: no GGUF file that can be read: {type(error).__name__}: {error}") from None
    keys = {}
    for key, item in reader.fields.items():
        if len(item.data) <= LONGEST_LIST:
            keys[key] = item.contents()
    return keys, [(tensor.name, float(tensor.n_bytes), float(tensor.n_elements)) for tensor in reader.tensors]
