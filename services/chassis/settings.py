"""What every model service takes from its command line, checked at once (law 8)."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy.fleet.faults import causes
from registry.endpoint import Capacity, Endpoint, Hardware, Speed
from services.chassis.certificates import TlsSettings
from services.chassis.registering import RegistrySettings
from services.chassis.telemetry import target_of


class SpeedSettings(BaseModel):
    """The operator's numbers, in the units of `registry.endpoint.Speed`. They win over what is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill_tps: float | None = Field(default=None, gt=0)
    prefill_doubling_ctx: float | None = Field(default=None, gt=0)
    step_ms: float | None = Field(default=None, gt=0)
    kv_us_per_ktoken: float | None = Field(default=None, ge=0)
    fixed_ms: float | None = Field(default=None, ge=0)
    tokens_per_s: float | None = Field(default=None, gt=0)


class InstanceSettings(RegistrySettings, TlsSettings):
    """Who an instance is and where it stands in the mesh."""

    kind: Literal["llm", "embedding", "rerank"]
    model: str = Field(min_length=1, max_length=256)
    source: str = ""  # a hub name or a local folder; empty where the engine needs none
    aliases: tuple[str, ...] = ()
    instance_id: str = Field(default="", max_length=128, pattern=r"^[a-zA-Z0-9_.:-]*$")
    listen: str = "127.0.0.1:0"  # port 0 = any free one
    advertise: str = ""  # host:port that others dial; empty = the address of the route to the registry
    keys: Path | None = None
    insecure: bool = False
    tier: Literal["primary", "long-context", "fallback"] = "primary"
    weight: float = Field(default=1.0, ge=0.001, le=1000)
    zone: str = Field(default="", max_length=64)
    group: str = Field(default="", max_length=64, pattern=r"^[a-zA-Z0-9_.:-]*$")  # that it is scaled with
    context: tuple[int, int] | None = None  # range of prompt + answer served here, tokens
    device: str = ""  # a name of the hardware catalogue; empty = detected
    max_running: int | None = Field(default=None, ge=1, le=1 << 20)
    kv_tokens: int | None = Field(default=None, ge=0)
    speed: SpeedSettings = SpeedSettings()
    speed_source: Literal["declared", "catalogue"] = "declared"  # whose numbers `speed` holds
    calibration: Path | None = None  # the file in which a measured speed may be; it wins over the catalogue's
    grace_s: float = Field(default=30.0, ge=0, le=3600)
    ready_file: Path | None = None
    otlp: str = ""  # OTLP/gRPC endpoint; empty: no spans
    otlp_ratio: float = Field(default=1.0, ge=0, le=1)  # of the traces that begin here, with direct callers
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        host, _ = split_address(self.listen)
        if fault := bind_fault(host, keys=self.keys is not None, insecure=self.insecure):
            faults.append(f"listen: {fault}")
        if self.otlp:
            try:
                target_of(self.otlp)
            except ValueError as error:
                faults.append(f"otlp: {error}")
        if self.advertise and not split_address(self.advertise)[1]:
            faults.append("advertise: needs a port, HOST:PORT")
        if self.context and not 0 <= self.context[0] < self.context[1]:
            faults.append("context: MIN must be below MAX")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def draft(self, instance_id: str, host: str, port: int, incarnation: int) -> Endpoint:
        """The endpoint as far as the settings know it; a program's `start` adds what the model knows."""
        low, high = self.context or (0, 0)
        speed = self.speed.model_dump(exclude_none=True)
        return Endpoint(
            id=instance_id,
            kind=self.kind,
            host=host,
            port=port,
            model=self.model,
            incarnation=incarnation,
            aliases=self.aliases,
            hardware=Hardware(device=self.device or "cpu"),
            speed=Speed(**speed, source=self.speed_source) if speed else Speed(),
            capacity=Capacity(
                context_min=low, context_max=high, max_running=self.max_running or 0, kv_tokens=self.kv_tokens or 0
            ),
            tier=self.tier,
            weight=self.weight,
            zone=self.zone,
            group=self.group,
        )


def split_address(text: str) -> tuple[str, int]:
    """HOST:PORT, [V6]:PORT or :PORT.

    Raises:
        ValueError: no such form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind_fault(host: str, *, keys: bool, insecure: bool) -> str:
    """Why this process must not listen there; empty if it may."""
    if keys or insecure or is_loopback(host):
        return ""
    return f"{host} can be reached from other machines: give --keys FILE, or --insecure to let everybody in"


def faults(error: ValidationError) -> list[str]:
    """Every fault of a configuration, a line each: the key's path and what is allowed."""
    found = []
    for item in causes(error.errors()):
        path, text = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        found.append(f"{path}: {text}" if path else text)  # checks of the whole name the key themselves
    return found
