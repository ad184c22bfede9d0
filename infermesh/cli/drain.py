"""`infermesh drain`."""

from __future__ import annotations

from typing import Annotated

import typer

from infermesh.cli import connect
from infermesh.cli.printing import emit_json


def command(
    instance_id: Annotated[str, typer.Argument(help="Whom; `infermesh instances` lists the ids.")],
    grace_s: Annotated[
        float | None, typer.Option(help="Seconds for running work; default: the instance's.", min=0)
    ] = None,
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 30,
    json: connect.Json = False,
) -> None:
    """Let an instance leave the registry, finish what it is running, and end.

    It needs the operator's key where keys are set.

    Examples:
        infermesh drain llm-1
        infermesh drain --grace-s 120 a800-1-a
    """
    with connect.client(gateway, api_key_file, timeout) as mesh:
        grace_ms = None if grace_s is None else round(grace_s * 1000)
        running = mesh.drain(instance_id, grace_ms=grace_ms)
    if json:
        emit_json({"id": instance_id, "running": running})
    else:
        print(f"{instance_id} is leaving; {running} requests are being finished")
