"""From a fleet's models to shapes, and to the faults of those that cannot be read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from deploy.fleet import Fleet, Model
from deploy.model_files.gguf_file import read_gguf
from deploy.planner.architecture import shape_of_architecture
from deploy.planner.config_json import Unreadable, shape_of_config
from deploy.planner.shape import Shape

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
LARGEST_CONFIG = 4 << 20
WAY_OUT = "point `source` at a folder with config.json or at a .gguf file, or describe the model under `architecture:`"


@dataclass(slots=True)
class Read:
    """Model id -> its shape, or why there is none and what to do. `absent`: those of them that are not on this disk."""

    shapes: dict[str, Shape] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)

    def needed(self, fleet: Fleet) -> dict[str, str]:
        """What keeps the fleet from being planned: an absent model that has its instances already does not."""
        have = {instance.model for instance in fleet.instances}
        return {id: why for id, why in self.unread.items() if not (id in have and id in self.absent)}


class _Absent(Unreadable):
    """Nothing on this disk says what the model is."""


def read_models(fleet: Fleet, folder: Path) -> Read:
    """`architecture:` wins over files. Relative sources are seen from `folder`."""
    found = Read()
    for model in fleet.models:
        try:
            found.shapes[model.id] = _shape(model, folder)
        except Unreadable as error:
            found.unread[model.id] = f"{error}; {WAY_OUT}"
            if isinstance(error, _Absent):
                found.absent.add(model.id)
    return found


def _shape(model: Model, folder: Path) -> Shape:
    if model.architecture:
        return shape_of_architecture(model, model.architecture)
    if not model.source:
        raise _Absent("nothing says what this model is")
    path = folder / Path(model.source).expanduser()
    if path.suffix == ".gguf":
        return read_gguf(path)
    if path.is_dir():
        parts = sorted(path.glob("*.gguf"))
        if parts and not (path / "config.json").exists():
            return read_gguf(parts[0])
        return read_config(path / "config.json")
    if model.source.startswith((".", "/", "~")):
        raise Unreadable(f"{model.source} is not there")
    cached = _from_hub_cache(model)
    if cached is None:
        raise _Absent(f"{model.source} is a hub name, and the model is not on this disk; plan downloads nothing")
    return read_config(cached)


def read_config(path: Path) -> Shape:
    """A config.json, and the bytes of the weight files in its folder.

    Raises:
        Unreadable: it is not there, no JSON object, or lacks what is needed.
    """
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise Unreadable(f"{path}: larger than {LARGEST_CONFIG >> 20} MiB, that is no config.json")
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise Unreadable(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise Unreadable(f"{path}: must be a JSON object")
    try:
        return shape_of_config(config, str(path), _weight_bytes(path.parent))
    except Unreadable as error:
        raise Unreadable(f"{path}: {error}") from None


def _weight_bytes(folder: Path) -> float | None:
    """Of the first kind of weight file that is there; the hub's folders often hold the same weights twice."""
    for pattern in WEIGHTS:
        if sizes := [path.stat().st_size for path in folder.glob(pattern)]:
            return float(sum(sizes))
    return None


def _from_hub_cache(model: Model) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model.source, "config.json", revision=model.revision or None)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
