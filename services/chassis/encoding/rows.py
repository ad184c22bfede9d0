"""Tokenised inputs and the frames that carry them to a replica and back. Pure.

A frame is a head (kind, serial, three counts) and a body. Ids travel as packed int32 and results as packed float32,
both in the machine's byte order: the two ends are processes of one host.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]


class Kind(IntEnum):
    """What a frame is. The first from the service is SETUP, the first from a replica READY or FAILED."""

    SETUP = 1  # JSON: how to load the model
    READY = 2  # JSON: what was loaded
    BATCH = 3  # rows to compute
    RESULT = 4  # float32 [rows, columns]
    FAILED = 5  # text: why
    PROGRESS = 6  # text: what is being done while loading


@dataclass(frozen=True, slots=True)
class Head:
    """`rows` x `columns` of a result, `rows` of a batch with `columns` leading tokens left out of pooling."""

    kind: Kind
    serial: int = 0
    rows: int = 0
    columns: int = 0
    size: int = 0  # of the body, bytes


_HEAD = struct.Struct("=BQIIQ")
HEAD_BYTES = _HEAD.size


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One sequence: token ids, and their segment (0 or 1) where it is a pair."""

    ids: Ids
    types: NDArray[np.int8] | None = None
    skip: int = 0  # leading tokens (a prompt) that the model's pooling leaves out

    def __len__(self) -> int:
        return len(self.ids)


def pack_head(head: Head) -> bytes:
    return _HEAD.pack(head.kind, head.serial, head.rows, head.columns, head.size)


def unpack_head(data: bytes) -> Head:
    kind, serial, rows, columns, size = _HEAD.unpack(data)
    return Head(Kind(kind), serial, rows, columns, size)


def pack_batch(serial: int, rows: Sequence[Row]) -> bytes:
    """A BATCH frame: lengths, ids, segments (absent where no row has any). All rows have one `skip`."""
    lengths = np.fromiter((len(row) for row in rows), np.int32, len(rows))
    parts = [lengths.tobytes(), np.concatenate([row.ids for row in rows]).astype(np.int32, copy=False).tobytes()]
    if any(row.types is not None for row in rows):
        parts.append(np.concatenate([_types(row) for row in rows]).tobytes())
    body = b"".join(parts)
    return pack_head(Head(Kind.BATCH, serial, len(rows), rows[0].skip, len(body))) + body


def _types(row: Row) -> NDArray[np.int8]:
    return np.zeros(len(row), np.int8) if row.types is None else row.types


def unpack_batch(head: Head, body: bytes) -> list[Row]:
    """What `pack_batch` packed."""
    lengths = np.frombuffer(body, np.int32, head.rows)
    total = int(lengths.sum())
    ids = np.frombuffer(body, np.int32, total, offset=4 * head.rows)
    tail = body[4 * (head.rows + total) :]
    types = np.frombuffer(tail, np.int8) if tail else None
    ends = np.cumsum(lengths)
    return [
        Row(ids[end - n : end], None if types is None else types[end - n : end], head.columns)
        for n, end in zip(lengths.tolist(), ends.tolist(), strict=True)
    ]


def pack_result(serial: int, result: Floats) -> bytes:
    """A RESULT frame: float32 [rows, columns]."""
    body = np.ascontiguousarray(result, np.float32).tobytes()
    return pack_head(Head(Kind.RESULT, serial, result.shape[0], result.shape[1], len(body))) + body


def unpack_result(head: Head, body: bytes) -> Floats:
    return np.frombuffer(body, np.float32).reshape(head.rows, head.columns)


def pack_text(kind: Kind, text: str, serial: int = 0) -> bytes:
    body = text.encode()
    return pack_head(Head(kind, serial, size=len(body))) + body


def padded(rows: Sequence[Row], pad_id: int, *, left: bool) -> tuple[NDArray[np.int64], ...]:
    """ids, mask and segments as int64 [rows, width], padded to the longest row on the model's side."""
    shape = (len(rows), max(len(row) for row in rows))
    ids, mask, types = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for at, row in enumerate(rows):
        where = slice(shape[1] - len(row), None) if left else slice(0, len(row))
        ids[at, where] = row.ids
        mask[at, where] = 1
        if row.types is not None:
            types[at, where] = row.types
    return ids, mask, types
