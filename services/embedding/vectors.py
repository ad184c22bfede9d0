"""From what a model gives to what a caller asked for: fewer dimensions, unit length, packed bytes. Pure."""

from __future__ import annotations

import numpy as np

from infermesh.errors import invalid
from infermesh.v1.inference_pb2 import Vector
from services.chassis.encoding.rows import Floats

SMALLEST = 1e-12  # norms below count as this, so that a zero vector stays one
CHUNK_FLOATS = 1 << 19  # worked on in one go: about a millisecond


def check_dimensions(asked: int, own: int) -> int:
    """How many components to keep."""
    if asked > own:
        raise invalid("dimensions", f"{asked} is more than the model's {own}")
    return asked or own


def chunk_rows(columns: int) -> int:
    return max(1, CHUNK_FLOATS // columns)


def finish(values: Floats, dimensions: int, *, unit: bool) -> list[Vector]:
    """The first `dimensions` components of each row, then of unit length if asked, little-endian."""
    kept = values[:, :dimensions]
    if unit:
        kept = kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), SMALLEST)
    packed = np.ascontiguousarray(kept, "<f4")
    return [Vector(packed=row.tobytes()) for row in packed]
