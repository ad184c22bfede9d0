"""`infermesh unban`."""

from __future__ import annotations

from typing import Annotated

import typer

from infermesh.cli import connect
from infermesh.cli.ban import who
from infermesh.cli.printing import emit_json


def command(
    instance_id: Annotated[str, typer.Argument(help="Whom; `infermesh instances` lists the ids.")],
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 10,
    json: connect.Json = False,
) -> None:
    """Lift a ban: the instance takes work again, on all gateways.

    It needs the operator's key where keys are set.

    Examples:
        infermesh unban a800-1-a
    """
    with connect.client(gateway, api_key_file, timeout) as mesh:
        mesh.unban(instance_id, by=who())
    if json:
        emit_json({"id": instance_id})
    else:
        print(f"{instance_id} is not banned any more")
