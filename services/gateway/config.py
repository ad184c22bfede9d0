"""The gateway's settings: checked as a whole, every fault named by its key's path."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Seconds = Annotated[float, Field(gt=0, le=86_400)]
LOG_LEVELS = ("debug", "info", "warning", "error")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Part):
    """Bounds on what a caller may send. `default_deadline_s` holds for requests that bring none, and caps others."""

    max_body_bytes: int = Field(default=8 << 20, ge=1024, le=64 << 20)
    default_deadline_s: Seconds = 600.0
    max_streams: int = Field(default=128, ge=1, le=4096)  # of one gRPC connection
    max_concurrent: int = Field(default=4096, ge=1, le=1 << 20)  # requests in this process, waiting ones included


class QueueBounds(_Part):
    """Bounds of the wait for room, for each model: whichever is reached first refuses the next request."""

    max_requests: int = Field(default=1024, ge=0, le=1 << 20)
    max_tokens: int = Field(default=8 << 20, ge=0)  # estimated prompt + answer
    max_wait_s: Seconds = 30.0


class GatewaySettings(_Part):
    grpc: str = "127.0.0.1:50050"
    http: str = "127.0.0.1:8000"  # empty: no REST
    registry: str = ""  # mesh://H:P[,H:P] or consul://H:P
    id: str = Field(default="", max_length=128)  # empty: gateway-<host>-<port>
    advertise: str = ""  # HOST:PORT to register; empty: the bound gRPC address
    keys: Path | None = None
    operator_key_file: Path | None = None  # carried to instances and to the registry
    insecure: bool = False  # serve beyond loopback without keys
    salt_file: Path | None = None  # the mesh's secret for cache salts; empty: derived from the operator's key
    limits: Limits = Limits()
    queue: QueueBounds = QueueBounds()
    weights: dict[str, Annotated[float, Field(ge=0.001, le=1000)]] = Field(
        default_factory=dict
    )  # instance id -> factor
    time_granularity_s: int = Field(default=86_400, ge=1)  # prompts see the time rounded down to this
    log_level: str = "info"
    otlp: str = ""  # OTLP/gRPC endpoint; empty: no spans
    grace_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    channelz: bool = False
    ready_file: Path | None = None

    @field_validator("grpc", "http")
    @classmethod
    def _address(cls, value: str, info: Any) -> str:
        if value == "" and info.field_name == "http":
            return value
        split_address(value)
        return value

    @field_validator("advertise")
    @classmethod
    def _advertised(cls, value: str) -> str:
        if value and split_address(value)[1] == 0:
            raise ValueError("needs a port, as in 10.0.0.5:50050")
        return value

    @field_validator("log_level")
    @classmethod
    def _level(cls, value: str) -> str:
        if value not in LOG_LEVELS:
            raise ValueError(f"{value!r} is not one of {', '.join(LOG_LEVELS)}")
        return value

    @field_validator("registry")
    @classmethod
    def _registry(cls, value: str) -> str:
        scheme, sep, rest = value.partition("://")
        if value and not (sep and scheme in ("mesh", "consul") and rest):
            raise ValueError(f"{value!r} is not mesh://HOST:PORT or consul://HOST:PORT")
        return value

    @model_validator(mode="after")
    def _open_only_at_home(self) -> GatewaySettings:
        if self.keys is None and not self.insecure:
            away = [name for name in ("grpc", "http") if not is_loopback(getattr(self, name))]
            if away:
                raise ValueError(
                    f"{' and '.join(away)} would listen beyond loopback without API keys: "
                    "give --keys keys.yaml, or --insecure to serve everybody"
                )
        return self


def split_address(text: str) -> tuple[str, int]:
    """HOST:PORT or [v6]:PORT.

    Raises:
        ValueError: what is wrong with it.
    """
    host, sep, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not sep or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT, as in 127.0.0.1:50050")
    return host, int(port)


def is_loopback(address: str) -> bool:
    if not address:
        return True
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def gateway_settings(**values: Any) -> GatewaySettings:
    """Builds the settings.

    Raises:
        ValueError: every fault, a line each, with the key's path.
    """
    try:
        return GatewaySettings.model_validate(values)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            path = ".".join(map(str, fault["loc"])) or "gateway"
            lines.append(f"{path}: {fault['msg'].removeprefix('Value error, ')}")
        raise ValueError("\n".join(lines)) from None
