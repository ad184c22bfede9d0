"""Registry addresses: `consul://HOST:PORT`, `consuls://HOST:PORT` (TLS), `mesh://HOST:PORT[,HOST:PORT]`."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

import grpc

from registry.consul import ConsulRegistry, ConsulSettings, Tls
from registry.consul_wire import Check
from registry.embedded import MeshRegistry, MeshSettings
from registry.port import RegistryError

_DEFAULT_PORTS: Final = {"consul": 8500, "consuls": 8501, "mesh": 0}
_SHAPES: Final = "consul://HOST:PORT, consuls://HOST:PORT (TLS) or mesh://HOST:PORT[,HOST:PORT]"


def open_registry(
    url: str,
    *,
    prefix: str = "infermesh",
    operator_key: str | None = None,
    token: str | None = None,
    token_file: str | None = None,
    tls: Tls | None = None,
    datacenter: str | None = None,
    check: Check | None = None,
) -> ConsulRegistry | MeshRegistry:
    """The registry at `url`. Nothing is dialled yet.

    Args:
        prefix: of the service names, `<prefix>-llm` and so on.
        operator_key: sent with `Register` to embedded registries.
        token, token_file, datacenter, check: for Consul.
        tls: files for `consuls://`; with `mesh://` it turns TLS on.

    Raises:
        RegistryError: the address, or a file that it needs, cannot be used.
    """
    scheme, addresses = parse_url(url)
    try:
        if scheme == "mesh":
            return MeshRegistry(MeshSettings(addresses, prefix, operator_key, _credentials(tls) if tls else None))
        if scheme == "consuls":
            tls = tls or Tls()
            tls.context()
        elif tls:
            raise RegistryError(f"{url}: TLS files are given, but consul:// is plaintext; write consuls://")
        if token_file:
            Path(token_file).read_text()
    except (OSError, ssl.SSLError) as error:
        raise RegistryError(f"{url}: a token or TLS file cannot be read: {error}") from error
    host, port = addresses[0]
    return ConsulRegistry(
        ConsulSettings(host, port, prefix, token, token_file, tls, datacenter, check or Check()),
    )


def parse_url(url: str) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Scheme and (host, port) pairs. Raises RegistryError that says what is wrong and what is allowed."""
    scheme, found, rest = url.partition("://")
    if not found or scheme not in _DEFAULT_PORTS:
        raise RegistryError(f"{url!r} is not a registry address; write {_SHAPES}")
    rest = rest.removesuffix("/")
    if any(mark in rest for mark in "/?#@"):
        raise RegistryError(f"{url!r}: only hosts and ports belong there; a token goes into a file. Write {_SHAPES}")
    parts = rest.split(",")
    if len(parts) > 1 and scheme != "mesh":
        raise RegistryError(f"{url!r}: one address; Consul's servers find each other. Name the local agent")
    addresses = tuple(split_address(part, default_port=_DEFAULT_PORTS[scheme]) for part in parts)
    if len(set(addresses)) != len(addresses):
        raise RegistryError(f"{url!r} names an address twice")
    return scheme, addresses


def split_address(text: str, *, default_port: int = 0, port_needed: bool = True) -> tuple[str, int]:
    """`HOST:PORT` or `[V6]:PORT`; the port may be left out where there is a default, or none is needed (0 then).
    Raises RegistryError."""
    host, port = text, ""
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise RegistryError(f"{text!r} is not [ADDRESS]:PORT")
        port = port[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    elif ":" in text:
        raise RegistryError(f"{text!r}: write an IPv6 address in brackets, [ADDRESS]:PORT")
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else (0 if port else default_port)
    absent = not port and not port_needed
    if not host or not (absent or 0 < number < 65536):
        raise RegistryError(f"{text!r} is not HOST:PORT with a port within 1 .. 65535")
    return host, number


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    def read(path: str | None) -> bytes | None:
        return Path(path).read_bytes() if path else None

    if not tls.verify:
        raise RegistryError("gRPC always verifies its server; give the CA's file instead of turning verification off")
    return grpc.ssl_channel_credentials(read(tls.ca_file), read(tls.key_file), read(tls.cert_file))
