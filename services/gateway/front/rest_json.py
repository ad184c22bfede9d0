"""JSON bodies, parsed within bounds.

orjson itself refuses what is deeper than 1,024, NaN, Infinity, numbers beyond float64, lone surrogates and bytes that
are not UTF-8. What it does not bound is how many values a body holds, and it parses them all in one step of the event
loop (a million keys: 100 ms), so a large body is counted first, slice by slice.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import orjson

from infermesh.errors import MeshError, Reason

SMALL = 1 << 18  # bytes; holds too few values to matter
FEW = 1 << 16  # structural characters; inside strings or not
MAX_VALUES = (1 << 20) + (1 << 16)  # a prompt of 2**20 token ids and whatever stands around it
MAX_CONTAINERS = 1 << 17  # objects, lists and keys
_SLICE = 1 << 18
_QUOTE, _COMMA, _COLON, _OPEN = ord('"'), ord(","), ord(":"), (ord("["), ord("{"))


async def parse_json(data: bytes) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
        MeshError: INVALID_ARGUMENT, for what is not a JSON object within the bounds.
    """
    if not data:
        raise MeshError(Reason.INVALID_ARGUMENT, "the body is empty; send a JSON object")
    if len(data) > SMALL and await _structure(data) > FEW:
        values, containers = await _count(data)
        if values > MAX_VALUES or containers > MAX_CONTAINERS:
            raise MeshError(
                Reason.INVALID_ARGUMENT,
                f"the body holds {values} values in {containers} objects, lists and keys; "
                f"at most {MAX_VALUES} and {MAX_CONTAINERS}",
            )
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise MeshError(Reason.INVALID_ARGUMENT, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise MeshError(Reason.INVALID_ARGUMENT, "the body must be a JSON object")
    return body


async def _structure(data: bytes) -> int:
    """Structural characters, inside strings or not; counting stops when there are many."""
    found = 0
    every = np.frombuffer(data, np.uint8)
    for start in range(0, len(data), _SLICE):
        part = every[start : start + _SLICE]
        found += sum(int(np.count_nonzero(part == mark)) for mark in (_COMMA, _COLON, *_OPEN))
        if found > FEW:
            break
        await asyncio.sleep(0)
    return found


async def _count(data: bytes) -> tuple[int, int]:
    """(values, objects + lists + keys) outside strings; of text that is not JSON, something."""
    # Two bytes for two bytes: what is left of quotes then opens or closes a string.
    plain = data.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
    values = containers = 0
    inside = 0
    for start in range(0, len(plain), _SLICE):
        part = np.frombuffer(plain, np.uint8, count=min(_SLICE, len(plain) - start), offset=start)
        parity = (np.cumsum(part == _QUOTE, dtype=np.int32) + inside) & 1
        outside = part[parity == 0]
        inside = int(parity[-1])
        opened = int(np.count_nonzero((outside == _OPEN[0]) | (outside == _OPEN[1])))
        keys = int(np.count_nonzero(outside == _COLON))
        containers += opened + keys
        values += opened + int(np.count_nonzero(outside == _COMMA))
        await asyncio.sleep(0)
    return values, containers
