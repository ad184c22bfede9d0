"""The gateway's settings: checked as a whole, every fault named by its key's path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.chassis.certificates import TlsSettings
from services.chassis.registering import RegistrySettings
from services.chassis.settings import bind_fault, faults, split_address
from services.chassis.telemetry import target_of
from services.gateway.routing.policy import Policy
from services.gateway.routing.scaling import Between

DEFAULT_PAST = Path(".infermesh/explain")
DEFAULT_BANS = Path(".infermesh/bans")  # a file a gateway
Seconds = Annotated[float, Field(gt=0, le=86_400)]


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


Share = Annotated[float, Field(gt=0, le=1e6)]


class Variant(_Part):
    """One of the models behind a weighted alias."""

    model: str = Field(min_length=1, max_length=256)
    weight: Share = 1.0


class Replicas(_Part):
    """How many instances a group may have."""

    least: int = Field(default=1, ge=1, le=4096)
    most: int = Field(ge=1, le=4096)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"{self.least} is above {self.most}")
        return self


class Routing(_Part):
    """`ttft_s`: the wait before the first token beyond which requests that may go to their model's fallback do. With
    `tpot_ms` (0 = none) it is what the metric of the objective judges answers by. `split`: device -> share of tokens
    while requests wait. `aliases` are sticky for a session. `scale`: group -> how many replicas it may have."""

    ttft_s: Seconds = 2.0
    tpot_ms: Annotated[float, Field(ge=0, le=86_400_000)] = 0.0
    split: dict[str, Share] = Field(default_factory=dict)
    fallbacks: dict[str, str] = Field(default_factory=dict)
    aliases: dict[str, Annotated[tuple[Variant, ...], Field(min_length=1, max_length=64)]] = Field(default_factory=dict)
    scale: Annotated[dict[str, Replicas], Field(max_length=256)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ends(self) -> Self:
        found: list[str] = []
        for model, other in self.fallbacks.items():
            found += (
                f"fallbacks.{model}: {name!r} is a weighted alias" for name in (model, other) if name in self.aliases
            )
            way = [model, other]
            while way[-1] != model and (other := self.fallbacks.get(way[-1], "")) and other not in way[1:]:
                way.append(other)
            if way[-1] == model:
                found.append(f"fallbacks.{model}: goes in a circle: {' -> '.join(way)}")
        for name, variants in self.aliases.items():
            models = [variant.model for variant in variants]
            found += (
                f"aliases.{name}: {model!r} is an alias, not a model" for model in models if model in self.aliases
            )
            if len(set(models)) < len(models):
                found.append(f"aliases.{name}: names a model twice")
        if found:
            raise ValueError("; ".join(found))
        return self

    def policy(self, weights: dict[str, float]) -> Policy:
        """As the router takes it."""
        aliases = {name: tuple((v.model, v.weight) for v in variants) for name, variants in self.aliases.items()}
        scale = {name: Between(replicas.least, replicas.most) for name, replicas in self.scale.items()}
        return Policy(self.ttft_s, self.split, self.fallbacks, aliases, weights, self.tpot_ms, scale)


class Telemetry(_Part):
    """What callers are told of one instance: `enable` False hides its ids, names replace them."""

    enable: bool = True
    instance_id: str = Field(default="", max_length=128, pattern=r"^[\x21-\x7e]*$")
    model_id: str = Field(default="", max_length=256, pattern=r"^[\x21-\x7e]*$")


class GatewaySettings(RegistrySettings, TlsSettings):
    grpc: str = "127.0.0.1:50050"
    http: str = "127.0.0.1:8000"  # empty: no REST
    id: str = Field(default="", max_length=128)  # empty: gateway-<host>-<port>
    advertise: str = ""  # HOST:PORT to register; empty: the bound gRPC address
    keys: Path | None = None
    insecure: bool = False  # serve beyond loopback without keys
    instances_ca_file: Path | None = None  # instances are spoken to over TLS, and this authority vouches for them
    instances_tls_name: str = Field(default="", max_length=253)  # their certificates are for it; empty: for their hosts
    salt_file: Path | None = None  # the mesh's secret for cache salts; empty: derived from the operator's key
    limits: Limits = Limits()
    queue: QueueBounds = QueueBounds()
    routing: Routing = Routing()
    weights: dict[str, Annotated[float, Field(ge=0.001, le=1000)]] = Field(
        default_factory=dict
    )  # instance id -> factor
    telemetry: dict[str, Telemetry] = Field(default_factory=dict)  # instance id, or * -> what callers are told
    time_granularity_s: int = Field(default=86_400, ge=1)  # prompts see the time rounded down to this
    explain_dir: Path | None = None  # of past decisions; None: DEFAULT_PAST, where that can be written
    explain_mib: int = Field(default=64, ge=0, le=1 << 20)  # 0: none are kept
    bans_file: Path | None = None  # keeps the operator's bans over a restart; None: DEFAULT_BANS
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp: str = ""  # OTLP/gRPC endpoint; empty: no spans
    otlp_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0  # of the traces that begin here
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

    @field_validator("otlp")
    @classmethod
    def _collector(cls, value: str) -> str:
        if value:
            target_of(value)
        return value

    @field_validator("advertise")
    @classmethod
    def _advertised(cls, value: str) -> str:
        if value and split_address(value)[1] == 0:
            raise ValueError("needs a port, as in 10.0.0.5:50050")
        return value

    @model_validator(mode="after")
    def _open_only_at_home(self) -> Self:
        doors = {"grpc": self.grpc, "http": self.http}
        found = {
            name: bind_fault(split_address(address)[0], keys=self.keys is not None, insecure=self.insecure)
            for name, address in doors.items()
            if address
        }
        if any(found.values()):
            raise ValueError("\n".join(f"{name}: {fault}" for name, fault in found.items() if fault))
        return self


def gateway_settings(**values: Any) -> GatewaySettings:
    """Builds the settings.

    Raises:
        ValueError: every fault, a line each, with the key's path.
    """
    try:
        return GatewaySettings.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(faults(error))) from None
