"""`infermesh instances`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from infermesh.cli import connect
from infermesh.cli.printing import emit_json, table

if TYPE_CHECKING:
    from infermesh.v1.mesh_pb2 import Instance

SPEED = ("prefill_tps", "prefill_doubling_ctx", "step_ms", "kv_us_per_ktoken", "fixed_ms", "tokens_per_s")
COLUMNS = ("ID", "KIND", "MODEL", "STATE", "TIER", "DEVICE", "RUN", "WAIT", "KV", "ADDRESS")


def command(
    kind: Annotated[str, typer.Option(help="llm, embedding or rerank; default: all.")] = "",
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 10,
    json: connect.Json = False,
) -> None:
    """List what is registered: who serves which model where, and how busy it is. Rejected entries show their reason.

    Examples:
        infermesh instances
        infermesh instances --kind llm
        infermesh instances --json | jq -r '.[] | select(.state != "healthy") | .id'
    """
    with connect.client(gateway, api_key_file, timeout) as mesh:
        rows = [document(instance) for instance in mesh.instances(kind=kind)]
    started = _started_here(gateway)
    for row in rows:
        row["pid"] = started.get(row["address"])
    if json:
        emit_json(rows)
        return
    table(COLUMNS, [_cells(row) for row in rows])
    for row in rows:
        if row["rejected_reason"]:
            print(f"{row['id']}: {row['rejected_reason']}")
        elif row["why"]:
            print(f"{row['id']}: {row['state']} for {row['since_s']:.0f} s: {row['why']}")


def document(instance: Instance) -> dict[str, Any]:
    """One instance for `--json`. Numbers that nobody told are null."""
    meta, load = instance.metadata, instance.load
    speed: dict[str, Any] = {key: float(meta[key]) for key in SPEED if key in meta}
    if speed:
        speed["source"] = meta.get("speed_source", "")

    def told(name: str) -> Any:
        return getattr(load, name) if load.HasField(name) else None  # type: ignore[arg-type]

    used = told("kv_used_ratio")
    return {
        "id": instance.id,
        "kind": instance.kind,
        "model": instance.model,
        "address": instance.address,
        "pid": None,
        "state": instance.state,
        "tier": meta.get("tier", "primary"),
        "device": meta.get("device", ""),
        "running": told("running"),
        "waiting": told("waiting"),
        "kv_used_ratio": None if used is None else round(used, 4),
        "speed": speed,
        "weight": round(instance.weight, 6),
        "why": instance.why,
        "since_s": round(instance.since_s, 1),
        "rejected_reason": instance.rejected_reason,
    }


def _started_here(gateway: str) -> dict[str, int]:
    """Address -> pid of what `infermesh up` runs in this folder, if the gateway asked is that mesh's."""
    from deploy.launch.run_file import read_run_file

    run = read_run_file()
    ports = {address.rpartition(":")[2] for address in gateway.split(",")}
    if run is None or run.gateway.rpartition(":")[2] not in ports:
        return {}
    return {child.address: child.pid for child in run.children if child.pid}


def _cells(row: dict[str, Any]) -> list[str]:
    used = row["kv_used_ratio"]
    return [
        row["id"],
        row["kind"],
        row["model"],
        row["state"],
        row["tier"],
        row["device"],
        _number(row["running"]),
        _number(row["waiting"]),
        "-" if used is None else f"{used:.0%}",
        row["address"],
    ]


def _number(value: Any) -> str:
    return "-" if value is None else str(value)
