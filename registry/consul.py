"""The Registry on Consul. Discovery, not the failure detector: streams notice first (DESIGN §5).

Over py-consul's asyncio client, with what that client lacks: stale reads, a deadline a call, a bound on what is read,
the answer's headers, TLS that can mix its options, and a token that may change on disk.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
import consul.aio
from consul.base import Response
from consul.callback import CB
from consul.exceptions import ACLDisabled, ACLPermissionDenied, BadRequest, ClientError, ConsulException

from registry.consul_keep import Keeper
from registry.consul_watch import Watcher
from registry.consul_wire import Answer, Away, Check, Refused, check_body, dns_weights
from registry.endpoint import Endpoint, to_metadata
from registry.port import Snapshot

MAX_BODY_BYTES: Final = 64 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tls:
    """`ca_file`: who is trusted (None = the system's store); `cert_file` and `key_file`: who we are."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Raises OSError or ssl.SSLError for a file that cannot be used."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file)
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class ConsulSettings:
    """Where Consul is and how to treat it. Times in seconds.

    `token_file` is read again at every call, so that a rotated token needs no restart; with neither token nor file
    `CONSUL_HTTP_TOKEN` counts, as for Consul's own tools. `reassert_s`: how often we look whether our registration is
    still there. `wait_s`: how long a query for changes is held open; after a restart that falls between two queries
    the next one waits in vain, its index being behind ours, so this bounds how long that goes unseen. `grace_s`: how
    long a vanishing of more than half of the instances is doubted.
    """

    host: str = "127.0.0.1"
    port: int = 8500
    prefix: str = "infermesh"
    token: str | None = None
    token_file: str | None = None
    tls: Tls | None = None
    datacenter: str | None = None
    check: Check = field(default_factory=Check)
    reassert_s: float = 1.5
    wait_s: float = 4.0
    grace_s: float = 10.0
    timeout_s: float = 5.0


class ConsulRegistry:
    """See `registry.port.Registry`."""

    def __init__(self, settings: ConsulSettings) -> None:
        self._calls = ConsulCalls(settings)
        self._keeper = Keeper(self._calls, settings.prefix, settings.host, settings.check, settings.reassert_s)
        self._watcher = Watcher(self._calls, settings.prefix, settings.host, settings.wait_s, settings.grace_s)

    async def register(self, endpoint: Endpoint) -> None:
        await self._keeper.register(endpoint)

    async def renew(self, endpoint: Endpoint) -> None:
        await self._keeper.renew(endpoint)

    async def deregister(self, id: str) -> None:
        await self._keeper.deregister(id)

    def watch(self, kinds: tuple[str, ...] = ()) -> AsyncIterator[Snapshot]:
        return self._watcher.watch(kinds)

    async def close(self) -> None:
        self._watcher.close()
        await self._keeper.close()
        await self._calls.close()


class _Http(consul.aio.HTTPClient):  # type: ignore[misc]
    def __init__(self, settings: ConsulSettings) -> None:
        # Not super().__init__: it passes options that aiohttp has deprecated, and drops the client's certificate when
        # verification is off.
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        consul.base.HTTPClient.__init__(self, host, settings.port, "https" if settings.tls else "http")
        self._timeout_s = settings.timeout_s
        ssl_context = settings.tls.context() if settings.tls else True
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=ssl_context))

    async def _request(
        self,
        callback: Any,
        method: str,
        uri: str,
        headers: Mapping[str, str] | None,
        data: Any = None,
        connections_timeout: float | None = None,
        raw: bool = False,
    ) -> Any:
        timeout = aiohttp.ClientTimeout(total=connections_timeout or self._timeout_s, sock_connect=2.0)
        async with self._session.request(method, uri, headers=headers, data=data, timeout=timeout) as reply:
            body = bytearray()
            async for chunk in reply.content.iter_chunked(1 << 16):
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise ConsulException(f"an answer of more than {MAX_BODY_BYTES} bytes")
            text = bytes(body) if raw else body.decode("utf-8", "replace")
            return callback(Response(reply.status, reply.headers, text))


class _Client(consul.aio.Consul):  # type: ignore[misc]
    def __init__(self, settings: ConsulSettings) -> None:
        self._settings = settings
        super().__init__(host=settings.host, port=settings.port, scheme="https" if settings.tls else "http")

    def http_connect(self, *_: Any, **__: Any) -> _Http:
        return _Http(self._settings)


class ConsulCalls:
    """`consul_wire.Calls` over HTTP. Connects lazily, since aiohttp wants a running loop."""

    def __init__(self, settings: ConsulSettings) -> None:
        self._settings = settings
        self._made: _Client | None = None

    def _client(self) -> _Client:
        if self._made is None:
            self._made = _Client(self._settings)
        if self._settings.token_file:
            self._made.token = Path(self._settings.token_file).read_text().strip()
        else:
            # py-consul prefers the environment to what it is told; we do not.
            self._made.token = self._settings.token or os.environ.get("CONSUL_HTTP_TOKEN")
        return self._made

    async def held(self, id: str) -> dict[str, Any] | None:
        """The agent's record of a service, None if it has none."""
        found = await _told(self._get(f"/v1/agent/service/{id}"))
        return found if isinstance(found, dict) else None

    async def put(self, name: str, endpoint: Endpoint, check: Check) -> None:
        async def register() -> None:
            await self._client().agent.service.register(
                name,
                service_id=endpoint.id,
                address=endpoint.host,
                port=endpoint.port,
                meta=to_metadata(endpoint),
                check=check_body(endpoint, check),
                weights=dns_weights(endpoint),
                replace_existing_checks=True,
            )

        await _told(register())

    async def close_door(self, id: str) -> None:
        """Makes the service critical at once."""

        async def maintain() -> None:
            await self._client().agent.service.maintenance(id, True, reason="leaving")

        await _told(maintain())

    async def remove(self, id: str) -> None:
        async def deregister() -> None:
            await self._client().agent.service.deregister(id)

        await _told(deregister())

    async def listing(self, name: str, index: int, wait_s: float) -> Answer:
        """Waits up to `wait_s` (and the sixteenth that Consul adds to spread the load) for a change after `index`."""
        params = [("stale", "")]
        if index:
            params += [("index", str(index)), ("wait", f"{max(1, round(wait_s * 1000))}ms")]
        if self._settings.datacenter:
            params.append(("dc", self._settings.datacenter))
        limit_s = wait_s * 17 / 16 + 2.0 if index else self._settings.timeout_s
        return await _told(self._get(f"/v1/health/service/{name}", _answer, params, limit_s))

    async def agent_address(self) -> str:
        """The address under which the agent is known to its cluster; empty if it does not tell."""
        told = await _told(self._get("/v1/agent/self"))
        member = told.get("Member") if isinstance(told, dict) else None
        return str(member.get("Addr") or "") if isinstance(member, dict) else ""

    async def _get(
        self, path: str, callback: Any = None, params: list[tuple[str, str]] | None = None, limit_s: float | None = None
    ) -> Any:
        # Not through agent.* and health.*: those lack the token here, the headers and the deadline there.
        client = self._client()
        return await client.http.get(
            callback or CB.json(), path, params, headers=client.prepare_headers(), connections_timeout=limit_s
        )

    async def close(self) -> None:
        if self._made:
            await self._made.http.close()
            self._made = None


async def _told(call: Awaitable[T]) -> T:
    """The library's many errors -> our two."""
    try:
        return await call
    except (ACLPermissionDenied, ACLDisabled) as error:
        raise Refused(
            f"Consul refuses the token ({error}); it needs service_prefix write for the mesh's services, and read"
        ) from error
    except BadRequest as error:
        raise Refused(f"Consul refuses the registration: {error}") from error
    except ClientError as error:
        if str(error).startswith(("408", "429")):
            raise Away(str(error)) from error
        raise Refused(f"Consul refuses: {error}") from error
    except (ConsulException, aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Away(f"{type(error).__name__}: {error}"[:200]) from error


def _answer(response: Response) -> Answer:
    CB._status(response)
    try:
        items = json.loads(response.body)
    except (ValueError, RecursionError) as error:
        raise ConsulException(f"an answer that is no JSON: {response.body[:80]!r}") from error
    if not isinstance(items, list) or "X-Consul-Index" not in response.headers:
        raise ConsulException("an answer that is not Consul's; is the address right?")
    return Answer(
        items,
        response.headers["X-Consul-Index"],
        response.headers.get("X-Consul-KnownLeader", "true") != "false",
        response.headers.get("X-Consul-Results-Filtered-By-ACLs", "false") == "true",
    )
