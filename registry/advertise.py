"""Which address an instance registers: what others can dial, or a refusal that says why (DESIGN §5)."""

from __future__ import annotations

import ipaddress
import socket

from registry.address import parse_url, split_address
from registry.consul_wire import is_loopback
from registry.endpoint import undialable
from registry.port import RegistryError


def advertised(advertise: str | None, bind_host: str, registry: str | None) -> tuple[str, int]:
    """The (host, port) to register; port 0 = the one that is bound.

    Args:
        advertise: `--advertise HOST:PORT`, or HOST alone; None = find out.
        bind_host: where the server listens.
        registry: the registry's address as `open_registry` takes it; empty = none.

    Raises:
        RegistryError: nobody could dial it.
    """
    registries = parse_url(registry)[1] if registry else ()
    if advertise:
        host, port = split_address(advertise, port_needed=False)
    else:
        host, port = bind_host, 0
        if is_unspecified(host):
            # The first registry that there is a route to: instances dial each other over the same network.
            host = next((local for address in registries if (local := route_to(*address))), "127.0.0.1")
    shown = f"{host}:{port}" if port else host
    if fault := undialable(host, port or 1):
        raise RegistryError(f"cannot register {shown}: {fault}")
    remote = [name for name, _ in registries if not is_loopback(resolved(name))]
    if remote and is_loopback(resolved(host)):
        raise RegistryError(
            f"cannot register {shown}: a loopback address, but the registry at {remote[0]} is on another host; "
            "listen on an address that others can dial, or start with --advertise HOST:PORT"
        )
    return host, port


def route_to(host: str, port: int) -> str:
    """Our address on the route to a host; empty if there is none. Connecting a UDP socket sends no packet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0]).partition("%")[0]
        except OSError:
            continue
    return ""


def resolved(host: str) -> str:
    """The first address of a name; the name itself where it has none now."""
    if is_loopback(host):
        return host
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return host


def is_unspecified(host: str) -> bool:
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
