"""All rows, in the order of the matrix."""

from __future__ import annotations

from tests.fault import (
    rows_abuse,
    rows_client,
    rows_consul,
    rows_engine,
    rows_floods,
    rows_host,
    rows_input,
    rows_leaving,
    rows_load,
    rows_network,
    rows_process,
    rows_registry,
    rows_tenants,
    soak,
)
from tests.fault.matrix import Row

MODULES = (
    *(rows_process, rows_engine, rows_leaving, rows_network, rows_client, rows_consul, rows_registry, rows_host),
    *(rows_abuse, rows_floods, rows_input, rows_load, rows_tenants, soak),
)
ROWS: tuple[Row, ...] = tuple(sorted((row for one in MODULES for row in one.ROWS), key=lambda row: row.number))


def chosen(text: str) -> list[Row]:
    """`21`, `1-13`, `3,34-43`, or empty for all.

    Raises:
        ValueError: no such row, or no such form.
    """
    if not text.strip():
        return list(ROWS)
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{part!r} is neither a row nor a range of rows, e.g. 21 or 1-13")
        numbers |= set(range(int(first), int(last or first) + 1))
    found = [row for row in ROWS if row.number in numbers]
    if not found:
        raise ValueError(f"no such row; there are {', '.join(str(row.number) for row in ROWS)}")
    return found
