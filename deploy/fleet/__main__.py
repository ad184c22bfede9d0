"""python -m deploy.fleet --write | --check: deploy/fleet.schema.json, from the code."""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.fleet import schema_text

SCHEMA = Path(__file__).parents[1] / "fleet.schema.json"


def main(argv: list[str]) -> int:
    if argv == ["--write"]:
        SCHEMA.write_text(schema_text())
        return 0
    if argv == ["--check"]:
        if SCHEMA.exists() and SCHEMA.read_text() == schema_text():
            return 0
        print("deploy/fleet.schema.json is stale: run python -m deploy.fleet --write", file=sys.stderr)
        return 1
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
