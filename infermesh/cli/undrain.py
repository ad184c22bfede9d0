"""`infermesh undrain`."""

from __future__ import annotations

from typing import Annotated

import typer

from infermesh.cli import connect
from infermesh.cli.printing import emit_json


def command(
    instance_id: Annotated[str, typer.Argument(help="Whom; `infermesh instances` lists the ids.")],
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 30,
    json: connect.Json = False,
) -> None:
    """Take a drain back while the instance still finishes its work: it registers again and serves on.

    One that has ended has to be started again. It needs the operator's key where keys are set.

    Examples:
        infermesh undrain llm-1
    """
    with connect.client(gateway, api_key_file, timeout) as mesh:
        running = mesh.undrain(instance_id)
    if json:
        emit_json({"id": instance_id, "running": running})
    else:
        print(f"{instance_id} serves on")
