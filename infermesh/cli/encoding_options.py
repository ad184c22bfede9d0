"""The options that `infermesh embedding` and the service half of `infermesh rerank` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

SPEED = ("fixed_ms", "tokens_per_s")
OPTIONS: dict[str, Any] = {
    "model": Annotated[str | None, typer.Option(help="The model id that clients use; all-minilm-l6-v2 unless told.")],
    "source": Annotated[str | None, typer.Option(help="A local folder or a hub name; the default model has its own.")],
    "alias": Annotated[list[str] | None, typer.Option(help="Another name of the model; may be repeated.")],
    "devices": Annotated[
        str | None, typer.Option(help="cpu, cuda, or several: cuda:2,cuda:3. Unless told: what is there.")
    ],
    "replicas": Annotated[int | None, typer.Option(help="Worker processes on each device.")],
    "backend": Annotated[str | None, typer.Option(help="auto, torch, onnx or openvino.")],
    "dtype": Annotated[str | None, typer.Option(help="auto, fp32, fp16 or bf16.")],
    "revision": Annotated[str | None, typer.Option(help="Of a hub model.")],
    "trust_remote_code": Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run the code that the model brings along.")
    ],
    "max_tokens": Annotated[int | None, typer.Option(help="Tokens of one input; unless told the model's own limit.")],
    "threads": Annotated[int | None, typer.Option(help="Of each CPU replica; unless told the cores, divided.")],
    "batch_tokens": Annotated[int | None, typer.Option(help="Padded tokens in a batch; unless told what takes 0.1 s.")],
    "batch_rows": Annotated[int | None, typer.Option(help="Inputs in a batch.")],
    "batch_wait_ms": Annotated[float | None, typer.Option(help="How long a small batch waits for more while busy.")],
    "batch_timeout_s": Annotated[float | None, typer.Option(help="Seconds after which a replica counts as hung.")],
    "queue_tokens": Annotated[int | None, typer.Option(help="Tokens that may be queued; more are refused.")],
    "queue_rows": Annotated[int | None, typer.Option(help="Inputs that may be queued; more are refused.")],
    "export_dir": Annotated[Path | None, typer.Option(help="Where exported models are kept.")],
    "listen": Annotated[str | None, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")],
    "advertise": Annotated[str | None, typer.Option(help="HOST:PORT that others dial.")],
    "registry": Annotated[str | None, typer.Option(help="mesh://H:P[,H:P], consul://H:P or consuls://H:P.")],
    "registry_prefix": Annotated[str | None, typer.Option(help="Of the service names in the registry.")],
    "registry_token_file": Annotated[Path | None, typer.Option(help="Consul's ACL token.")],
    "registry_ca_file": Annotated[Path | None, typer.Option(help="consuls: whom to trust.")],
    "registry_cert_file": Annotated[Path | None, typer.Option(help="consuls: our certificate.")],
    "registry_key_file": Annotated[Path | None, typer.Option(help="consuls: its key.")],
    "instance_id": Annotated[str | None, typer.Option(help="Its id in the mesh.")],
    "tier": Annotated[str | None, typer.Option(help="primary, long-context or fallback.")],
    "weight": Annotated[float | None, typer.Option(help="The operator's factor on its share.")],
    "zone": Annotated[str | None, typer.Option(help="Where it stands.")],
    "group": Annotated[str | None, typer.Option(help="The group of like instances that it is scaled with.")],
    "max_running": Annotated[int | None, typer.Option(help="Requests that gateways may have here at once.")],
    "device": Annotated[str | None, typer.Option(help="The card, as the hardware catalogue names it.")],
    "fixed_ms": Annotated[float | None, typer.Option(help="Declared speed: milliseconds of a short request.")],
    "tokens_per_s": Annotated[float | None, typer.Option(help="Declared speed: tokens a second.")],
    "calibration": Annotated[
        Path | None, typer.Option(help="File in which `infermesh calibrate` left measured speeds.")
    ],
    "keys": Annotated[Path | None, typer.Option("--keys", help="keys.yaml: who may call.")],
    "tls_cert_file": Annotated[Path | None, typer.Option(help="It serves over TLS: its certificate, PEM.")],
    "tls_key_file": Annotated[Path | None, typer.Option(help="Its key.")],
    "operator_key_file": Annotated[Path | None, typer.Option(help="The operator's key, to register with.")],
    "insecure": Annotated[bool | None, typer.Option("--insecure", help="Listen beyond loopback without keys.")],
    "grace_s": Annotated[float | None, typer.Option(help="Seconds to finish what is running when told to stop.")],
    "ready_file": Annotated[Path | None, typer.Option(help="Written, as JSON, once it serves.")],
    "otlp": Annotated[str | None, typer.Option(help="OTLP/gRPC endpoint for spans; none unless told.")],
    "otlp_ratio": Annotated[float | None, typer.Option(help="Share of the traces that begin here, 0 .. 1.")],
    "log_level": Annotated[str | None, typer.Option(help="debug, info, warning or error.")],
}


def takes(**more: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Gives a function of keywords the parameters that typer reads: these options, and `more` of its own."""
    kinds = OPTIONS | more

    def signed(function: Callable[..., int]) -> Callable[..., int]:
        keyword = inspect.Parameter.KEYWORD_ONLY
        named = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in kinds.items()]
        function.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        function.__annotations__ = dict(kinds)
        return function

    return signed


def given(options: dict[str, Any]) -> dict[str, Any]:
    """What was given, in the names and shapes of the settings; the rest keeps the settings' own defaults."""
    found = {name: value for name, value in options.items() if value is not None}
    if "alias" in found:
        found["aliases"] = tuple(found.pop("alias"))
    if "devices" in found:
        found["devices"] = tuple(filter(None, found["devices"].split(",")))
    if speed := {name: found.pop(name) for name in SPEED if name in found}:
        found["speed"] = speed
    return found
