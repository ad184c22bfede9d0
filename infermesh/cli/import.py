"""`infermesh import`: another server's configuration as a fleet file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infermesh.cli import BAD_USAGE, Failure
from infermesh.cli.printing import remark

if TYPE_CHECKING:
    from deploy.fleet import Fleet


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="configs/common.json, or a YAML file of Workers.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FLEET.yaml", help="Write there, not to standard output.")
    ] = None,
) -> None:
    """Read how another server was configured and write it as a fleet file; keys without a counterpart are told by name.

    Examples:
        infermesh import configs/common.json -o fleet.yaml
        infermesh import worker.yaml
    """
    import yaml

    from deploy.planner.document import fleet_document

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{file}: {getattr(error, 'strerror', None) or error}", BAD_USAGE) from None
    fleet, remarks = _read(text, str(file))
    written = yaml.safe_dump(fleet_document(fleet), sort_keys=False, allow_unicode=True, width=120)
    if output:
        try:
            output.write_text(f"# Made by `infermesh import {file}`.\n{written}", encoding="utf-8")
        except OSError as error:
            raise Failure(f"--output {output}: {error.strerror}") from None
        remark(f"written: {output}")
    else:
        print(written, end="")
    for line in remarks:
        remark(f"infermesh: {line}")


def _read(text: str, name: str) -> tuple[Fleet, tuple[str, ...]]:
    import json

    import yaml

    from deploy.fleet import FleetError, parse_fleet
    from deploy.render.common_config import import_common
    from deploy.render.worker import fleet_of_workers, has_workers

    if has_workers(text):
        return fleet_of_workers(text, name)
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise Failure(f"{name}: neither Worker resources nor JSON: {error}", BAD_USAGE) from None
    found = import_common(raw)
    if found.faults:
        raise FleetError(name, found.faults)
    return parse_fleet(yaml.safe_dump(found.document), name), tuple(found.remarks)
