"""How many cores a container may use, by either kind of control group."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.chassis.encoding.settings import _quota


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({"cpu.max": "150000 100000\n"}, (150_000, 100_000)),
        ({"cpu.max": "max 100000\n"}, (0, 100_000)),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, (200_000, 100_000)),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, (-1, 100_000)),
        ({"cpu.max": "nonsense"}, (0, 0)),
        ({}, (0, 0)),
    ],
)
def test_the_quota_of_both_kinds_of_control_groups(
    tmp_path: Path, files: dict[str, str], allowed: tuple[int, int]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _quota(tmp_path) == allowed
