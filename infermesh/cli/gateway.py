"""`infermesh gateway`: one gateway in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

LIMITS = ("max_body_bytes", "default_deadline_s", "max_streams", "max_concurrent")
# Where a setting lies -> the option it came from, for errors.
OPTIONS = {
    "limits.": "",
    "queue.max_requests": "queue_requests",
    "queue.max_tokens": "queue_tokens",
    "queue.max_wait_s": "queue_wait_s",
    "routing.ttft_s": "objective_ttft_s",
    "routing.tpot_ms": "objective_tpot_ms",
    "weights.": "instance_weight.",
}
QUEUE = {"queue_requests": "max_requests", "queue_tokens": "max_tokens", "queue_wait_s": "max_wait_s"}
SETTINGS: dict[str, dict[str, str]] = {
    "services.gateway.config:GatewaySettings": {},
    "services.gateway.config:Limits": {},
    "services.gateway.config:QueueBounds": {theirs: ours for ours, theirs in QUEUE.items()},
    "services.gateway.config:Routing": {"ttft_s": "objective_ttft_s"},
}


def command(
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT for gRPC; 127.0.0.1:50050 unless told.")] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT for REST; 127.0.0.1:8000 unless told.")] = None,
    registry: Annotated[str | None, typer.Option(help="mesh://H:P[,H:P], consul://H:P or consuls://H:P.")] = None,
    registry_prefix: Annotated[str | None, typer.Option(help="Of the service names in the registry.")] = None,
    registry_token_file: Annotated[Path | None, typer.Option(help="Consul's ACL token.")] = None,
    registry_ca_file: Annotated[Path | None, typer.Option(help="consuls: whom to trust.")] = None,
    registry_cert_file: Annotated[Path | None, typer.Option(help="consuls: our certificate.")] = None,
    registry_key_file: Annotated[Path | None, typer.Option(help="consuls: its key.")] = None,
    id: Annotated[str | None, typer.Option(help="Its id in the mesh.")] = None,
    advertise: Annotated[str | None, typer.Option(help="HOST:PORT that others dial.")] = None,
    keys: Annotated[Path | None, typer.Option(help="keys.yaml: who may call.")] = None,
    operator_key_file: Annotated[Path | None, typer.Option(help="The operator's key, shown to instances.")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Listen beyond loopback without keys.")] = None,
    tls_cert_file: Annotated[Path | None, typer.Option(help="Both doors speak TLS: the certificate, PEM.")] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    instances_ca_file: Annotated[
        Path | None, typer.Option(help="Instances are spoken to over TLS: the authority that vouches for them.")
    ] = None,
    instances_tls_name: Annotated[
        str | None, typer.Option(help="Whom their certificates are for; their hosts unless told.")
    ] = None,
    salt_file: Annotated[Path | None, typer.Option(help="The mesh's secret for cache salts.")] = None,
    instance_weight: Annotated[
        list[str] | None, typer.Option(help="ID=FACTOR on an instance's share; may be repeated.")
    ] = None,
    fallback: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=OTHER: served instead, under pressure and where a request allows it."),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL:WEIGHT[,MODEL:WEIGHT], e.g. chat=v1:95,v2:5; may be repeated.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="DEVICE=SHARE of tokens while requests wait; may be repeated.")
    ] = None,
    objective_ttft_s: Annotated[
        float | None, typer.Option(help="Seconds to the first token that are aimed at.")
    ] = None,
    objective_tpot_ms: Annotated[
        float | None, typer.Option(help="Milliseconds between two tokens that are aimed at; a metric judges by it.")
    ] = None,
    scale: Annotated[
        list[str] | None, typer.Option(help="GROUP=MIN:MAX replicas, for which it says how many there should be.")
    ] = None,
    time_granularity_s: Annotated[int | None, typer.Option(help="Prompts see the time rounded down to this.")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request.")] = None,
    default_deadline_s: Annotated[float | None, typer.Option(help="For requests that bring none.")] = None,
    max_streams: Annotated[int | None, typer.Option(help="Concurrent calls of one gRPC connection.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests in this process.")] = None,
    queue_requests: Annotated[int | None, typer.Option(help="Requests that may wait for a model.")] = None,
    queue_tokens: Annotated[int | None, typer.Option(help="Tokens that may wait for a model.")] = None,
    queue_wait_s: Annotated[float | None, typer.Option(help="Seconds that a request may wait.")] = None,
    explain_dir: Annotated[
        Path | None, typer.Option(help="Where decisions about past requests are kept; .infermesh/explain unless told.")
    ] = None,
    explain_mib: Annotated[int | None, typer.Option(help="MiB of them, 64 unless told; 0: none.")] = None,
    bans_file: Annotated[
        Path | None, typer.Option(help="Keeps bans over a restart; .infermesh/bans/ID.json unless told.")
    ] = None,
    otlp: Annotated[str | None, typer.Option(help="OTLP/gRPC endpoint for spans; none unless told.")] = None,
    otlp_ratio: Annotated[
        float | None, typer.Option(help="Share of the traces beginning here that are kept, 0 .. 1.")
    ] = None,
    telemetry: Annotated[
        list[str] | None,
        typer.Option(help="ID=off hides an instance's ids from callers, ID=NAME[,MODEL] renames them; ID may be *."),
    ] = None,
    channelz: Annotated[bool | None, typer.Option("--channelz", help="Serve channelz.")] = None,
    grace_s: Annotated[float | None, typer.Option(help="Seconds to finish what is running when told to stop.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Written, as JSON, once it serves.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> int:
    """Run one gateway: gRPC and REST in front of whatever the registry lists.

    Examples:
        infermesh gateway --registry consul://10.0.0.5:8500
        infermesh gateway --registry mesh://10.0.0.5:50049 --grpc 0.0.0.0:50050 --http 0.0.0.0:8000 --keys keys.yaml
    """
    settings = settings_of({name: value for name, value in locals().items() if value is not None})
    from services.gateway.app import main

    return main(settings)


def settings_of(given: dict[str, Any]) -> Any:
    """Settings from the options that were given.

    Raises:
        ValueError: all faults at once, a line each.
    """
    from services.gateway.config import gateway_settings

    values = dict(given)
    limits = {name: values.pop(name) for name in LIMITS if name in values}
    queue = {theirs: values.pop(ours) for ours, theirs in QUEUE.items() if ours in values}
    weights = dict(map(_weight, values.pop("instance_weight", ())))
    telemetry = dict(map(_telemetry, values.pop("telemetry", ())))
    routing: dict[str, Any] = {
        "fallbacks": dict(_pair("fallback", text) for text in values.pop("fallback", ())),
        "aliases": {
            name: _variants(models) for name, models in (_pair("alias", text) for text in values.pop("alias", ()))
        },
        "split": dict(_pair("split", text) for text in values.pop("split", ())),
        "scale": dict(map(_replicas, values.pop("scale", ()))),
        "ttft_s": values.pop("objective_ttft_s", None),
        "tpot_ms": values.pop("objective_tpot_ms", None),
    }
    routing = {name: part for name, part in routing.items() if part not in (None, {})}
    parts = {"limits": limits, "queue": queue, "weights": weights, "routing": routing, "telemetry": telemetry}
    try:
        return gateway_settings(**values, **{name: part for name, part in parts.items() if part})
    except ValueError as error:
        raise ValueError("\n".join(map(_as_given, str(error).splitlines()))) from None


def _as_given(fault: str) -> str:
    """queue.max_wait_s: … -> queue_wait_s: …"""
    for path, option in OPTIONS.items():
        if fault.startswith(path):
            return option + fault.removeprefix(path)
    return fault


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{option}: {text!r} is not NAME=VALUE")
    return name, value


def _telemetry(text: str) -> tuple[str, dict[str, Any]]:
    id, shown = _pair("telemetry", text)
    if shown == "off":
        return id, {"enable": False}
    instance_id, _, model_id = shown.partition(",")
    return id, {"instance_id": instance_id, "model_id": model_id}


def _variants(text: str) -> list[dict[str, str]]:
    found = []
    for part in text.split(","):
        model, colon, weight = part.rpartition(":")
        found.append({"model": model, "weight": weight} if colon else {"model": part})
    return found


def _replicas(text: str) -> tuple[str, dict[str, str]]:
    name, between = _pair("scale", text)
    least, colon, most = between.partition(":")
    if not colon:
        raise ValueError(f"scale: {text!r} is not GROUP=MIN:MAX, e.g. chat-a800=1:4")
    return name, {"least": least, "most": most}


def _weight(text: str) -> tuple[str, float]:
    id, equals, factor = text.partition("=")
    try:
        return id, float(factor if id and equals else "")
    except ValueError:
        raise ValueError(f"instance-weight: {text!r} is not ID=FACTOR, e.g. a800-1=2") from None
