"""`infermesh ban`."""

from __future__ import annotations

import getpass
import re
import socket
from typing import Annotated

import typer

from infermesh.cli import connect
from infermesh.cli.printing import emit_json, remark

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def command(
    instance_id: Annotated[str, typer.Argument(help="Whom; `infermesh instances` lists the ids.")],
    lasting: Annotated[str, typer.Option("--for", help="30s, 10m, 2h or 1d; default: until `infermesh unban`.")] = "",
    why: Annotated[str, typer.Option(help="For others to read.")] = "",
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 10,
    json: connect.Json = False,
) -> None:
    """Take an instance out of work on all gateways, whether it answers or not. It finishes what it has.

    `infermesh instances` shows who banned it and why. It needs the operator's key where keys are set.

    Examples:
        infermesh ban a800-1-a --why 'fan is broken'
        infermesh ban --for 10m llm-1
    """
    for_s = seconds(lasting)
    with connect.client(gateway, api_key_file, timeout) as mesh:
        mesh.ban(instance_id, why=why, by=who(), for_s=for_s)
        there = any(one.id == instance_id for one in mesh.instances())
    if not there:
        remark(
            f"{instance_id} is not registered now: the ban is for when it comes. If another one was meant, "
            f"`infermesh unban {instance_id}`; `infermesh instances` lists the ids"
        )
    if json:
        emit_json({"id": instance_id, "for_s": for_s, "registered": there})
    else:
        until = f"for {lasting}" if lasting else f"until `infermesh unban {instance_id}`"
        print(f"{instance_id} is banned {until}")


def seconds(text: str) -> float | None:
    """10m -> 600. None for nothing.

    Raises:
        ValueError: not a time.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if found is None or not float(found[1]):
        raise ValueError(f"for: {text!r} is not a time such as 30s, 10m, 2h or 1d")
    return float(found[1]) * UNITS[found[2] or "s"]


def who() -> str:
    """The person at this terminal, as others may know him."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):
        return socket.gethostname()
