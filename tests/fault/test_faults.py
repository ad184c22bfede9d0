"""A few quick rows of the fault matrix, so that a change that breaks one is seen at once; all: `make faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.__main__ import run
from tests.fault.matrix import Ground
from tests.fault.rows import ROWS, chosen

QUICK = (1, 2, 6, 16, 30, 42, 59)


@pytest.mark.slow
@pytest.mark.parametrize("number", QUICK)
async def test_row(number: int, tmp_path: Path) -> None:
    (row,) = chosen(str(number))
    result = await run(row, Ground(tmp_path, runs_wanted=1, seconds_wanted=5))
    if result.verdict == "skipped":
        pytest.skip(result.measured)
    assert result.verdict == "ok", f"expected: {row.expected}; measured: {result.measured}"


def test_rows_are_chosen_by_number() -> None:
    numbers = [row.number for row in ROWS]
    assert numbers == sorted(set(numbers)), "each row once, in order"
    assert [row.number for row in chosen("1-3, 21")] == [1, 2, 3, 21] and chosen("") == list(ROWS)
    for wrong in ("one", "5-", "999"):
        with pytest.raises(ValueError):
            chosen(wrong)
