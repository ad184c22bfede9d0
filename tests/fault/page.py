"""docs/faults.md: the table of what was measured. A row that was not run again keeps its line."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Sequence

from tests.fault.matrix import Result
from tests.kit.children import ROOT

PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- rows: written by make faults ARGS=--write -->", "<!-- end of rows -->"
HEAD = "| row | fault | expected | measured | verdict | when |\n|---|---|---|---|---|---|"


def write(results: Sequence[Result]) -> None:
    """Replaces the lines of these rows, and the line about the machine."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = {int(match[1]): match[0] for match in re.finditer(r"^\| (\d+) \|.*$", table, re.M)}
    when = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}, {_commit()}"
    for result in results:
        cells = (result.row.fault, result.row.expected, result.measured, result.verdict, when)
        lines[result.row.number] = f"| {result.row.number} | {' | '.join(map(_cell, cells))} |"
    body = "\n".join(lines[number] for number in sorted(lines))
    before = re.sub(r"^Machine: .*$", f"Machine: {_machine()}", before, flags=re.M)
    PAGE.write_text(f"{before}{BEGIN}\n{HEAD}\n{body}\n{END}{after}")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _commit() -> str:
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "no commit"


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"
