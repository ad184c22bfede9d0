"""The options that `infermesh embedding` and the service half of `infermesh rerank` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

SPEED = ("fixed_ms", "tokens_per_s")

Model = Annotated[str | None, typer.Option(help="The model id that clients use; all-minilm-l6-v2 unless told.")]
Source = Annotated[str | None, typer.Option(help="A local folder or a hub name; the default model has its own.")]
Alias = Annotated[list[str] | None, typer.Option(help="Another name of the model; may be repeated.")]
Devices = Annotated[str | None, typer.Option(help="cpu, cuda, or several: cuda:2,cuda:3. Unless told: what is there.")]
Replicas = Annotated[int | None, typer.Option(help="Worker processes on each device.")]
Backend = Annotated[str | None, typer.Option(help="auto, torch, onnx or openvino.")]
Dtype = Annotated[str | None, typer.Option(help="auto, fp32, fp16 or bf16.")]
Revision = Annotated[str | None, typer.Option(help="Of a hub model.")]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run the code that the model brings along.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens of one input; unless told the model's own limit.")]
Threads = Annotated[int | None, typer.Option(help="Of each CPU replica; unless told the cores, divided.")]
BatchTokens = Annotated[int | None, typer.Option(help="Padded tokens in a batch; unless told what takes 0.1 s.")]
BatchRows = Annotated[int | None, typer.Option(help="Inputs in a batch.")]
BatchWaitMs = Annotated[float | None, typer.Option(help="How long a small batch waits for more while busy.")]
BatchTimeoutS = Annotated[float | None, typer.Option(help="Seconds after which a replica counts as hung.")]
QueueTokens = Annotated[int | None, typer.Option(help="Tokens that may be queued; more are refused.")]
QueueRows = Annotated[int | None, typer.Option(help="Inputs that may be queued; more are refused.")]
ExportDir = Annotated[Path | None, typer.Option(help="Where exported models are kept.")]
FixedMs = Annotated[float | None, typer.Option(help="Declared speed: milliseconds of a short request.")]
TokensPerS = Annotated[float | None, typer.Option(help="Declared speed: tokens a second.")]
Listen = Annotated[str | None, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")]
Advertise = Annotated[str | None, typer.Option(help="HOST:PORT that others dial.")]
Registry = Annotated[str | None, typer.Option(help="mesh://H:P[,H:P], consul://H:P or consuls://H:P.")]
RegistryPrefix = Annotated[str | None, typer.Option(help="Of the service names in the registry.")]
RegistryTokenFile = Annotated[Path | None, typer.Option(help="Consul's ACL token.")]
RegistryCaFile = Annotated[Path | None, typer.Option(help="consuls: whom to trust.")]
RegistryCertFile = Annotated[Path | None, typer.Option(help="consuls: our certificate.")]
RegistryKeyFile = Annotated[Path | None, typer.Option(help="consuls: its key.")]
InstanceId = Annotated[str | None, typer.Option(help="Its id in the mesh.")]
Tier = Annotated[str | None, typer.Option(help="primary, long-context or fallback.")]
Weight = Annotated[float | None, typer.Option(help="The operator's factor on its share.")]
Zone = Annotated[str | None, typer.Option(help="Where it stands.")]
MaxRunning = Annotated[int | None, typer.Option(help="Requests that gateways may have here at once.")]
Device = Annotated[str | None, typer.Option(help="The card, as the hardware catalogue names it.")]
KeysFile = Annotated[Path | None, typer.Option("--keys", help="keys.yaml: who may call.")]
OperatorKeyFile = Annotated[Path | None, typer.Option(help="The operator's key, to register with.")]
Insecure = Annotated[bool | None, typer.Option("--insecure", help="Listen beyond loopback without keys.")]
GraceS = Annotated[float | None, typer.Option(help="Seconds to finish what is running when told to stop.")]
ReadyFile = Annotated[Path | None, typer.Option(help="Written, as JSON, once it serves.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.")]


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
