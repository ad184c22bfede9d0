"""`infermesh instances`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
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
        rows = [document(instance, time.time()) for instance in mesh.instances(kind=kind)]
        groups = [] if json else mesh.groups(kind=kind)
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
    for group in groups:
        wanted = f"{group.desired} wanted" if group.desired else "no opinion yet"
        why = f" ({group.why})" if group.why else ""
        print(f"group {group.name}: {group.replicas} of {group.least}-{group.most}, {wanted}{why}")


def document(instance: Instance, now: float) -> dict[str, Any]:
    """One instance for `--json` at `now` (Unix seconds). Numbers that nobody told are null."""
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
        "conditions": conditions(instance, now),
    }


def conditions(instance: Instance, now: float) -> list[dict[str, str]]:
    """Its state as Kubernetes tells states. `now`: Unix seconds; without `since_s` no transition time."""
    accepted = not instance.rejected_reason
    known = instance.state not in ("", "suspect")
    since = ""
    if instance.since_s:
        moment = datetime.fromtimestamp(now - instance.since_s, UTC)
        since = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    ready = "True" if instance.state == "healthy" else "False" if known else "Unknown"
    state = instance.state.title().replace("_", "") or "Unknown"
    why = instance.rejected_reason or instance.why
    told = [
        ("Accepted", str(accepted), "Registered" if accepted else "Rejected", instance.rejected_reason),
        ("Ready", ready, state, why),
        ("Draining", str(instance.state == "draining"), state, ""),
    ]
    return [
        {"type": type, "status": status, "reason": reason, "message": message, "lastTransitionTime": since}
        for type, status, reason, message in told
    ]


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
