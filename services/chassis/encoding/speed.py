"""How fast the replicas are together: seconds of a request = fixed_ms + tokens / tokens_per_s. Measured at start."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from services.chassis.encoding.rows import Floats, Row

SHORT, LONG = 8, 128  # tokens in a row
FEW_S = 0.15  # a measurement shorter than this is repeated with more work
MOST_ROWS = 512  # of LONG tokens, per replica

Run = Callable[[Sequence[Row]], Awaitable[Floats]]


@dataclass(frozen=True, slots=True)
class Measured:
    """`fixed_ms`: one short request on an idle instance; `tokens_per_s`: of all replicas, padding aside."""

    fixed_ms: float
    tokens_per_s: float


async def measure(run: Run, token: int, longest: int, replicas: int) -> Measured:
    """Runs a few short rows, then long ones until it takes long enough to trust. The best of each counts: what else
    runs on the machine just now only ever makes it slower.
    """
    short = [_row(token, min(SHORT, longest))]
    for _ in range(2 * replicas):
        await run(short)
    fixed_s = min([await _seconds(run, short) for _ in range(8)])
    row = _row(token, min(LONG, longest))
    count = 4 * replicas
    while (took_s := await _seconds(run, [row] * count)) < FEW_S and count < MOST_ROWS * replicas:
        count *= 4
    took_s = min(took_s, await _seconds(run, [row] * count))
    return Measured(1000 * fixed_s, count * len(row) / max(1e-6, took_s - min(fixed_s, took_s / 2)))


async def _seconds(run: Run, rows: Sequence[Row]) -> float:
    began = time.monotonic()
    await run(rows)
    return time.monotonic() - began


def _row(token: int, length: int) -> Row:
    return Row(np.full(length, token, np.int32))
