"""How verbs print: one JSON document, or a table, on standard output; remarks on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def emit_json(document: Any) -> None:
    """The only thing that `--json` prints. NaN has no place in JSON and would be a fault of ours."""
    json.dump(document, sys.stdout, ensure_ascii=False, allow_nan=False, indent=2 if sys.stdout.isatty() else None)
    sys.stdout.write("\n")


def remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns padded to their widest cell; plain text, so that it can be piped and grepped."""
    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
