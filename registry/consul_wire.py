"""What goes to Consul and what comes back, as plain values. Pure.

Only what both 1.8 and current releases know is used. Consul's answers are not trusted: whoever can write to it can put
anything there, so every item is read on its own and an unusable one becomes a `Rejected`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from registry.endpoint import Endpoint, Rejected, from_metadata, to_metadata
from registry.port import Entry


class Away(Exception):
    """Consul did not answer, or answered that it cannot now. Waiting may mend it."""


class Refused(Exception):
    """Consul does not want this, or us. Waiting will not mend it; the message says what may."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a blocking query. `index` as sent; `leader`: whether the servers have one (False: maybe old)."""

    items: list[Any]
    index: str
    leader: bool
    filtered: bool


class Calls(Protocol):
    """What the keeper and the watcher ask of Consul. Each raises `Away` or `Refused`."""

    async def held(self, id: str) -> dict[str, Any] | None: ...

    async def put(self, name: str, endpoint: Endpoint, check: Check) -> None: ...

    async def close_door(self, id: str) -> None: ...

    async def remove(self, id: str) -> None: ...

    async def listing(self, name: str, index: int, wait_s: float) -> Answer: ...

    async def agent_address(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Check:
    """How Consul looks after an instance: `grpc.health.v1` of `service` (empty = the whole server).

    Consul raises an interval under 1 s to 1 s, and `deregister_after_s` under 60 to 60. `tls`: the instance speaks TLS;
    Consul then asks it without looking at its certificate, which may be for another name and of another authority: it
    learns no secret there, and gateways do look.
    """

    service: str = ""
    interval_s: float = 1.0
    timeout_s: float = 1.0
    deregister_after_s: float = 60.0
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """What Consul lists of one kind."""

    entries: Mapping[str, Entry]
    rejected: tuple[Rejected, ...]


def service_name(prefix: str, kind: str) -> str:
    return f"{prefix}-{kind}"


def check_body(endpoint: Endpoint, check: Check) -> dict[str, Any]:
    """The status starts as passing: an instance registers itself only once its own health says SERVING, and Consul has
    an opinion of its own one interval later. Starting critical would keep a good instance idle for up to 1.5 s."""
    body: dict[str, Any] = {
        "checkid": f"infermesh:{endpoint.id}",
        "name": "gRPC health",
        "grpc": f"{endpoint.address}/{check.service}" if check.service else endpoint.address,
        "interval": f"{check.interval_s:g}s",
        "timeout": f"{check.timeout_s:g}s",
        "status": "passing",
        "deregistercriticalserviceafter": f"{check.deregister_after_s:g}s",
    }
    if check.tls:
        body |= {"grpcusetls": True, "tlsskipverify": True}
    return body


def dns_weights(endpoint: Endpoint) -> dict[str, int]:
    """Our weight for those who ask Consul's DNS; 1.0 is 100."""
    return {"passing": min(65535, max(1, round(endpoint.weight * 100))), "warning": 1}


def next_index(last: int, answered: str) -> int:
    """The index of the next blocking query. 0 = ask without waiting: the index went backwards (Consul restarted, or
    another server with less knowledge answered) or is no index at all."""
    try:
        index = int(answered)
    except ValueError:
        return 0
    return index if index > 0 and last <= index else 0


def assertion(held: object, endpoint: Endpoint) -> str:
    """What to do, given the agent's record of our id: "register" | "superseded" | "" (all is well)."""
    if not isinstance(held, dict):
        return "register"
    meta = held.get("Meta") or {}
    wanted = to_metadata(endpoint)
    if meta.get("incarnation", "") != wanted.get("incarnation", ""):
        return "superseded"
    same = meta == wanted and held.get("Address") == endpoint.host and held.get("Port") == endpoint.port
    return "" if same else "register"


def read_listing(kind: str, items: object, registry_host: str, most: int = 10_000) -> Listing:
    """Reads `/v1/health/service/<name>`. Of one id the passing one counts, then the one that was created last."""
    best: dict[str, tuple[tuple[bool, int], Entry]] = {}
    rejected: list[Rejected] = []
    for item in (items if isinstance(items, list) else [])[:most]:
        try:
            rank, read = _item(kind, item, registry_host)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            rejected.append(Rejected("?", kind, "?", f"not an entry of Consul: {type(error).__name__}"))
            continue
        if isinstance(read, Rejected):
            rejected.append(read)
        elif read.endpoint.id not in best or best[read.endpoint.id][0] < rank:
            best[read.endpoint.id] = (rank, read)
    return Listing(
        {id: best[id][1] for id in sorted(best)}, tuple(sorted(rejected, key=lambda line: (line.id, line.reason)))
    )


def _item(kind: str, item: Any, registry_host: str) -> tuple[tuple[bool, int], Entry | Rejected]:
    service = item["Service"]
    host = service.get("Address") or item["Node"]["Address"]
    read = from_metadata(str(service["ID"]), kind, str(host), int(service["Port"]), _pairs(service.get("Meta")))
    passing = all(check["Status"] in ("passing", "warning") for check in item.get("Checks") or ())
    rank = (passing, int(service.get("CreateIndex") or 0))
    if isinstance(read, Rejected):
        return rank, read
    fault = foreign_loopback(read.host, registry_host)
    if fault:
        return rank, Rejected(read.id, kind, read.address, fault)
    return rank, Entry(read, passing)


def _pairs(meta: object) -> dict[str, str]:
    pairs: Iterable[tuple[object, object]] = meta.items() if isinstance(meta, dict) else ()
    return {str(key): str(value) for key, value in pairs}


def foreign_loopback(host: str, registry_host: str) -> str:
    """Why a loopback address in a registry on another host is of no use (the reader would dial itself)."""
    if is_loopback(host) and not is_loopback(registry_host):
        return f"{host} is a loopback address, but the registry is not on this host; use --advertise HOST:PORT"
    return ""


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
