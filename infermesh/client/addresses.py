"""Several gateways, one at a time: which one to call, and when to go on to the next. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from grpc import RpcError, StatusCode

from infermesh.errors import MeshError, Reason, from_rpc, spoken

DEFAULT = "127.0.0.1:50050"
TLS = "grpcs://"


def split(addresses: str | Sequence[str]) -> tuple[list[str], bool]:
    """host:port[,host:port…] or a list of them, each with `grpcs://` before it for TLS. Returns them without, and
    whether they are to be spoken to over TLS.

    Raises:
        ValueError: no address, one that is none, or some with TLS and some without.
    """
    parts = addresses.split(",") if isinstance(addresses, str) else list(addresses)
    told = [part.strip() for part in parts if part.strip()]
    secure = {address.startswith(TLS) for address in told}
    if len(secure) > 1:
        raise ValueError(f"{', '.join(told)}: {TLS} before all of them, or before none")
    found = [address.removeprefix(TLS) for address in told]
    for address in found:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "//" in host:
            raise ValueError(f"{address!r} is not HOST:PORT or {TLS}HOST:PORT, e.g. {DEFAULT}")
    if not found:
        raise ValueError(f"no gateway is named; give HOST:PORT, e.g. {DEFAULT}")
    return found, secure == {True}


class Rotation:
    """Remembers the gateway that answered last."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._current = 0

    def order(self) -> list[int]:
        """Whom to ask, in turn: the current one first."""
        return [(self._current + step) % self._count for step in range(self._count)]

    def answered(self, index: int) -> None:
        self._current = index


def try_next(error: RpcError) -> bool:
    """May another gateway be asked? Yes when this one was not reached or is leaving, while nothing has been received:
    a gateway that did answer has tried the instances already.
    """
    reason = from_rpc(error).reason
    return reason is (Reason.DRAINING if spoken(error) else Reason.INSTANCE_LOST)


HEALTH = "/grpc.health.v1.Health/Check"  # asked and answered as bytes: its stubs are in a package that we do not need
SERVING = b"\x08\x01"
PROBE_S = 2.0
AWAY = (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)


def as_error(error: RpcError, addresses: Sequence[str], *, got: str = "") -> MeshError:
    """What the caller is told of a failed call. `got`: how much of the answer had come, empty = nothing."""
    meant = from_rpc(error)
    if spoken(error):
        return meant
    if meant.reason is Reason.INSTANCE_LOST:
        if got:
            return MeshError(Reason.STREAM_LOST, f"the connection to the gateway broke after {got}: {meant.message}")
        return unreachable(addresses, meant.message)
    if meant.reason is Reason.DEADLINE_EXCEEDED:
        so_far = f"only {got} came" if got else "no answer came"
        why = f"{so_far} within the time limit; give it more (--timeout, or the client's `timeout`), or ask for less"
        return MeshError(Reason.DEADLINE_EXCEEDED, why)
    return meant


def unreachable(addresses: Sequence[str], why: str) -> MeshError:
    where = ", ".join(addresses)
    return MeshError(Reason.NO_INSTANCE, f"no gateway answers at {where}: {why}; `infermesh up` starts one")


def metadata(api_key: str, extra: Sequence[tuple[str, str]] = ()) -> tuple[tuple[str, str], ...]:
    pairs = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    return (*pairs, *extra)
