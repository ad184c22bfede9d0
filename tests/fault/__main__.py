"""Runs rows of the fault matrix: `make faults ROW=21`, or `python -m tests.fault --row 1-13 --write`.

Exit code 1 when a row failed, 2 when there is no such row.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.fault import page
from tests.fault.matrix import Ground, Measured, Result, Row, Skipped
from tests.fault.rows import chosen
from tests.kit.children import leave_nothing_when_told_to_stop


async def run(row: Row, ground: Ground) -> Result:
    """One row, whatever happens."""
    begun = time.monotonic()
    try:
        async with asyncio.timeout(row.limit_s + 2 * ground.seconds_wanted):
            measured = await row.run(ground)
    except Skipped as reason:
        return Result(row, "skipped", str(reason), time.monotonic() - begun)
    except Exception as error:
        what = "took too long" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
        measured = Measured(False, what.replace("\n", " ")[:400])
    return Result(row, "ok" if measured.ok else "FAILED", measured.text, time.monotonic() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault", description=__doc__)
    parser.add_argument("--row", default="", help="21, 1-13 or 3,34-43; all unless told")
    parser.add_argument("--runs", type=int, default=0, help="how often each fault is tried, where that can be chosen")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long a fault lasts, where that can be chosen")
    parser.add_argument("--write", action="store_true", help="put what was measured into docs/faults.md")
    parser.add_argument("--keep", action="store_true", help="leave the logs of failed rows where they are")
    given = parser.parse_args()
    try:
        rows = chosen(given.row)
    except ValueError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections that break are the point
    results = []
    for row in rows:
        print(f"row {row.number:>2}  {row.fault}\n        expected  {row.expected}", flush=True)
        folder = Path(tempfile.mkdtemp(prefix=f"infermesh-fault-{row.number}-"))
        result = asyncio.run(run(row, Ground(folder, given.runs, given.seconds)))
        results.append(result)
        print(f"        measured  {result.measured}\n        {result.verdict}  ({result.took_s:.0f} s)", flush=True)
        if result.verdict == "FAILED" and given.keep:
            print(f"        logs      {folder}", flush=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    failed = [str(result.row.number) for result in results if result.verdict == "FAILED"]
    skipped = sum(result.verdict == "skipped" for result in results)
    print(f"\n{len(results)} rows: {len(results) - len(failed) - skipped} ok, {len(failed)} failed, {skipped} skipped")
    if failed:
        print(f"failed: {', '.join(failed)}")
    if given.write:
        page.write(results)
    return 1 if failed else 0


if __name__ == "__main__":
    leave_nothing_when_told_to_stop()
    sys.exit(main())
