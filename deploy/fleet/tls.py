"""What a fleet file says of certificates."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SecretName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]


class Certificate(BaseModel):
    """A certificate, its key and its authority: tls.crt, tls.key and ca.crt, as Kubernetes and cert-manager name them.
    `name`: one of those that the certificate is for; whoever speaks to the process checks it by that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?$")]
    folder: str  # of these files, seen from where `up` is called; of a Compose project, from compose.yaml
    secret: SecretName  # that holds them on Kubernetes, of type kubernetes.io/tls


class DoorCertificate(Certificate):
    folder: str = "tls/gateway"
    secret: SecretName = "infermesh-gateway-tls"


class InsideCertificate(Certificate):
    folder: str = "tls/instances"
    secret: SecretName = "infermesh-instances-tls"


class Tls(BaseModel):
    """Who serves over TLS: both doors of the gateway; all instances, of which gateways then trust those alone that
    ca.crt vouches for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gateway: DoorCertificate | None = None
    instances: InsideCertificate | None = None
