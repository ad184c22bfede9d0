"""What every client verb shares: the options that find the gateway and let the caller in, and the client itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infermesh.cli import BAD_USAGE, Failure

if TYPE_CHECKING:
    from infermesh.client import Client
    from infermesh.transport import Trust
    from infermesh.v1.mesh_pb2 import Instance

Gateway = Annotated[str, typer.Option("--gateway", metavar="HOST:PORT[,…]", help="Gateways, or one instance.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="File with the API key (or the key itself in INFERMESH_API_KEY).")
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds for the whole call.", min=0.001)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Measured = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Speeds that `calibrate` measured; default: what the fleet file names, else .infermesh/calibration.yaml.",
    ),
]
InstancesCaFile = Annotated[
    Path | None, typer.Option(help="Instances are spoken to over TLS: the authority that vouches for them.")
]
InstancesTlsName = Annotated[str, typer.Option(help="Whom their certificates are for; their hosts unless told.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Model id; default: the only one of its kind.")]
DEFAULT_GATEWAY = "127.0.0.1:50050"


def client(gateway: str, api_key_file: Path | None, timeout: float) -> Client:
    from infermesh.client import Client

    try:
        return Client(gateway, api_key=api_key(api_key_file), timeout=timeout)
    except (ValueError, OSError) as error:
        raise Failure(f"--gateway: {error}", BAD_USAGE) from None


def api_key(file: Path | None) -> str:
    if file is None:
        return os.environ.get("INFERMESH_API_KEY", "")
    try:
        return file.read_text().strip()
    except OSError as error:
        raise Failure(f"--api-key-file {file}: {error.strerror}", BAD_USAGE) from None


def operator_pass(key: str, address: str, life_s: float) -> tuple[tuple[str, str], ...]:
    """What is shown to an instance, whose address others could have registered, instead of the operator's key."""
    from services.chassis.passes import Passes

    return (("authorization", Passes(key).show(address, life_s)),) if key else ()


def trusted(ca_file: Path | None, name: str) -> Trust | None:
    """How instances are spoken to; None = in the clear."""
    from infermesh.transport import trust

    if ca_file is None:
        return None
    try:
        return trust(ca_file, name)
    except (OSError, ValueError) as error:
        raise Failure(f"--instances-ca-file: {error}", BAD_USAGE) from None


def instance(mesh: Client, id: str) -> Instance:
    """A registered instance, to be asked directly."""
    found = mesh.instances()
    for one in found:
        if one.id == id and one.address:
            return one
    known = ", ".join(sorted(one.id for one in found)) or "nobody"
    raise Failure(f"{id} is not registered; registered: {known}", BAD_USAGE)


def only_model(mesh: Client, kind: str, model: str) -> str:
    """The model asked for, or the only one of its kind that is there."""
    if model:
        return model
    found = sorted({instance.model for instance in mesh.instances(kind=kind) if instance.state != "rejected"})
    if len(found) == 1:
        return found[0]
    if not found:
        raise Failure(f"no {kind} model is registered; `infermesh instances` lists what is there")
    raise Failure(f"say which model with --model: {', '.join(found)}", BAD_USAGE)
