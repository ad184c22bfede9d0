"""Rows 64, 70: more than there is room for."""

from __future__ import annotations

from tests.fault.matrix import Row

ROWS: tuple[Row, ...] = ()
