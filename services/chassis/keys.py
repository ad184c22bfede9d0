"""Who may call: API keys by their SHA-256, from `keys.yaml`. Pure, but for `load_keys`, which reads the file.

    version: 1
    keys:
      - {sha256: 9f86…, tenant: acme, class: core, models: [chat], tokens_per_minute: 200000}
      - {sha256: 1b4f…, tenant: ops, role: operator}     # may drain, calibrate, register and relay

`printf %s "$KEY" | sha256sum` prints a key's line. The file never holds a key itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy.fleet.faults import causes
from infermesh.errors import MeshError, Reason
from services.chassis.passes import LENT_SCHEME, SCHEME, Passes


class Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")
    klass: Literal["core", "standard", "bulk"] = Field(default="standard", alias="class")
    role: Literal["client", "operator"] = "client"
    models: tuple[str, ...] = ()
    tokens_per_minute: int = Field(default=0, ge=0)


MESH = Key(sha256="0" * 64, tenant="mesh", role="operator")  # whoever shows a pass; no key has this sum


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    keys: tuple[Key, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        places: dict[str, int] = {}
        twice = [
            f"keys.{place} is the same key as keys.{places[key.sha256]}"
            for place, key in enumerate(self.keys)
            if places.setdefault(key.sha256, place) != place
        ]
        if twice:
            raise ValueError("; ".join(twice))
        return self


class Keys:
    """The keys of one process. None at all means an open process (loopback, or `--insecure`). `passes`: also lets those
    through who show one, as operators."""

    def __init__(self, keys: tuple[Key, ...] = (), passes: Passes | None = None) -> None:
        self._keys = {key.sha256: key for key in keys}
        self._passes = passes

    def __bool__(self) -> bool:
        return bool(self._keys)

    def who(self, authorization: str | None) -> Key | None:
        """The key behind an `authorization: Bearer …` (or `Mesh …`) value; None when this process has no keys.

        Raises:
            MeshError: UNAUTHENTICATED.
        """
        if not self._keys:
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() == SCHEME:
            if self._passes is None:
                raise MeshError(Reason.UNAUTHENTICATED, "mesh passes are for instances that have --operator-key-file")
            self._passes.check(secret.strip())
            return MESH
        if scheme.lower() != "bearer" or not secret.strip():
            raise MeshError(Reason.UNAUTHENTICATED, "an API key is needed: authorization: Bearer KEY")
        digest = hashlib.sha256(secret.strip().encode()).hexdigest()
        found = self._keys.get(digest)
        if found is None:
            raise MeshError(Reason.UNAUTHENTICATED, "this API key is not known")
        return found

    def lent(self, authorization: str | None) -> bytes | None:
        """The relay of a call in direct mode, whose pass this spends; None when no such pass is shown, or needed.

        Raises:
            MeshError: UNAUTHENTICATED.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if not self._keys or self._passes is None or scheme.lower() != LENT_SCHEME:
            return None
        return self._passes.spend(token.strip())

    def operator(self, authorization: str | None) -> None:
        """Lets operators pass.

        Raises:
            MeshError: UNAUTHENTICATED or PERMISSION_DENIED.
        """
        key = self.who(authorization)
        if key is not None and key.role != "operator":
            raise MeshError(Reason.PERMISSION_DENIED, "this needs the operator's key")


def load_keys(path: Path | None, passes: Passes | None = None) -> Keys:
    """Reads `keys.yaml`; None gives an open set.

    Raises:
        ValueError: every fault of the file, a line each.
    """
    if path is None:
        return Keys()
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a readable file with --keys") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    try:
        return Keys(KeyFile.model_validate(raw).keys, passes)
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in causes(error.errors())]
        raise ValueError("\n".join(lines)) from None
