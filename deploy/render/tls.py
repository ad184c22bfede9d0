"""Certificates in containers: where they are, and how whoever asks a process checks it. Pure.

A folder is mounted as a whole, so that a renewed certificate shows in it; of the instances' folder a gateway gets the
authority alone, never their key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deploy.fleet import Fleet
from deploy.fleet.tls import Certificate
from deploy.launch.commands import TlsFiles, tls_files

DOOR, INSIDE = "/run/tls/gateway", "/run/tls/instances"
CA = "ca.crt"


def door(fleet: Fleet) -> TlsFiles | None:
    """Of the gateway's doors, as its container sees them."""
    return tls_files(fleet.tls.gateway, DOOR) if fleet.tls.gateway else None


def inside(fleet: Fleet) -> TlsFiles | None:
    """Of every instance, as its container sees them."""
    return tls_files(fleet.tls.instances, INSIDE) if fleet.tls.instances else None


def health(port: int, tls: TlsFiles | None) -> list[str]:
    """How a container asks itself. The certificate is for a name, not for loopback."""
    if tls is None:
        return ["infermesh", "health", f"127.0.0.1:{port}"]
    return ["infermesh", "health", f"grpcs://127.0.0.1:{port}", "--ca-file", tls.ca, "--tls-name", tls.name]


def host_mounts(fleet: Fleet, *, gateway: bool) -> Iterator[dict[str, Any]]:
    """Of a Compose service."""
    door, inside = fleet.tls.gateway, fleet.tls.instances
    if gateway and door:
        yield bound(_beside(door), DOOR)
    if gateway and inside:
        yield bound(f"{_beside(inside)}/{CA}", f"{INSIDE}/{CA}")
    if not gateway and inside:
        yield bound(_beside(inside), INSIDE)


def authority_mount(certificate: Certificate, target: str) -> dict[str, Any]:
    """For who asks the gateway."""
    return bound(f"{_beside(certificate)}/{CA}", target)


def bound(source: str, target: str) -> dict[str, Any]:
    """Read-only. Where the source is not there Docker would make a folder of that name, and go on."""
    return {
        "type": "bind",
        "source": source,
        "target": target,
        "read_only": True,
        "bind": {"create_host_path": False},
    }


def secret_mounts(fleet: Fleet, *, gateway: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(volume, mount) pairs of a pod."""
    door, inside = fleet.tls.gateway, fleet.tls.instances
    if gateway and door:
        yield _secret("gateway-tls", door, DOOR, ("tls.crt", "tls.key"))
    if inside:
        yield _secret("instances-tls", inside, INSIDE, (CA,) if gateway else ("tls.crt", "tls.key", CA))


def compose_remarks(fleet: Fleet, uid: int) -> Iterator[str]:
    for one in _certificates(fleet):
        yield f"tls: {_beside(one)} wants tls.crt for {one.name}, tls.key and {CA}, readable by uid {uid}"


def k8s_remarks(fleet: Fleet) -> Iterator[str]:
    for one in _certificates(fleet):
        files = ("tls.crt", "tls.key", *((CA,) if one is fleet.tls.instances else ()))
        given = " ".join(f"--from-file={file}" for file in files)
        yield (
            f"tls: the pods want a Secret with a certificate for {one.name}, of cert-manager or by "
            f"kubectl create secret generic {one.secret} --type=kubernetes.io/tls {given}"
        )


def _certificates(fleet: Fleet) -> list[Certificate]:
    return [one for one in (fleet.tls.gateway, fleet.tls.instances) if one]


def _beside(certificate: Certificate) -> str:
    folder = certificate.folder.rstrip("/")
    return folder if folder.startswith(("/", "./", "../")) else f"./{folder}"


def _secret(
    name: str, certificate: Certificate, target: str, keys: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    items = [{"key": key, "path": key} for key in keys]
    volume = {"name": name, "secret": {"secretName": certificate.secret, "defaultMode": 0o440, "items": items}}
    return volume, {"name": name, "mountPath": target, "readOnly": True}
