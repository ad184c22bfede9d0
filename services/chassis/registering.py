"""How a process reaches its registry: the settings that every one of them takes, and the connection made from them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from registry.address import open_registry, parse_url
from registry.consul import Tls
from registry.consul_wire import Check
from registry.port import Registry, RegistryError


class RegistrySettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: str = ""  # mesh://HOST:PORT[,HOST:PORT], consul://HOST:PORT, consuls://HOST:PORT (TLS); empty = none
    registry_prefix: str = Field(default="infermesh", pattern=r"^[a-z][a-z0-9-]{0,40}$")  # of the service names
    registry_token_file: Path | None = None  # Consul's ACL token
    registry_ca_file: Path | None = None  # with consuls://
    registry_cert_file: Path | None = None
    registry_key_file: Path | None = None
    operator_key_file: Path | None = None  # what this process shows to others of the mesh, where keys are set

    @field_validator("registry")
    @classmethod
    def _registry_address(cls, value: str) -> str:
        if value:
            try:
                parse_url(value)
            except RegistryError as error:
                raise ValueError(str(error)) from None
        return value


def operator_key(settings: RegistrySettings) -> str:
    """The operator's key of this process; empty without one.

    Raises:
        ValueError: the file cannot be read or is empty.
    """
    path = settings.operator_key_file
    if path is None:
        return ""
    try:
        key = path.read_text().strip()
    except OSError as error:
        raise ValueError(f"operator key file {path}: {error.strerror}") from None
    if not key:
        raise ValueError(f"operator key file {path}: empty")
    return key


def connect_registry(settings: RegistrySettings, *, over_tls: bool = False) -> Registry | None:
    """The registry of these settings, nothing dialled yet; None where none is named. `over_tls`: that is how this
    process serves.

    Raises:
        RegistryError: the address or one of the files cannot be used.
        ValueError: the operator's key file.
    """
    if not settings.registry:
        return None

    def name(path: Path | None) -> str | None:
        return str(path) if path else None

    files = tuple(map(name, (settings.registry_ca_file, settings.registry_cert_file, settings.registry_key_file)))
    return open_registry(
        settings.registry,
        prefix=settings.registry_prefix,
        operator_key=operator_key(settings) or None,
        token_file=name(settings.registry_token_file),
        check=Check(tls=over_tls),
        tls=Tls(files[0], files[1], files[2]) if any(files) else None,
    )
