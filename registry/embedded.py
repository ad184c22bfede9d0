"""The Registry on embedded registries (`mesh://A,B`): registered at every one, watched at all and merged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
from tenacity import RetryCallState

from infermesh.transport import channel_options
from infermesh.v1 import registry_pb2 as pb
from infermesh.v1 import registry_pb2_grpc as pb_grpc
from registry.consul_wire import service_name
from registry.directory import Listed
from registry.embedded_keep import LOST, WRITE_S, Stay, brief
from registry.embedded_watch import HostView, MergedView
from registry.endpoint import KINDS, Endpoint
from registry.host import to_line
from registry.patience import patiently
from registry.port import RegistryError, Snapshot, check_registrable

log = logging.getLogger("infermesh.registry.mesh")

FIRST_ANSWER_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """`addresses`: (host, port) of each registry. `operator_key` is what `Register` needs where keys are set.
    `credentials`: TLS; None = plaintext."""

    addresses: tuple[tuple[str, int], ...]
    prefix: str = "infermesh"
    operator_key: str | None = None
    credentials: grpc.ChannelCredentials | None = None
    grace_s: float = 10.0


class MeshRegistry:
    """See `registry.port.Registry`."""

    def __init__(self, settings: MeshSettings) -> None:
        self._settings = settings
        self._channels: list[grpc.aio.Channel] = []
        self._stays: dict[str, list[Stay]] = {}
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    async def register(self, endpoint: Endpoint) -> None:
        check_registrable(endpoint)
        for stay in self._stays.pop(endpoint.id, []):
            await stay.end()
        key = self._settings.operator_key
        stays = [Stay(stub, self._settings.prefix, endpoint, key) for stub in self._stubs()]
        self._stays[endpoint.id] = stays
        await asyncio.wait([stay.tried for stay in stays], timeout=WRITE_S)
        refused = [stay.tried.result() for stay in stays if stay.tried.done() and stay.tried.result()]
        if refused:
            await asyncio.gather(*(stay.leave() for stay in self._stays.pop(endpoint.id)))
            raise RegistryError(f"{endpoint.id} cannot be registered: {refused[0]}")

    async def renew(self, endpoint: Endpoint) -> None:
        check_registrable(endpoint)
        if endpoint.id not in self._stays:
            raise RegistryError(f"{endpoint.id} is not registered; call register first")
        for stay in self._stays[endpoint.id]:
            stay.change(endpoint)

    async def deregister(self, id: str) -> None:
        await asyncio.gather(*(stay.leave() for stay in self._stays.pop(id, [])))

    async def watch(self, kinds: tuple[str, ...] = ()) -> AsyncIterator[Snapshot]:
        loop = asyncio.get_running_loop()
        services = [service_name(self._settings.prefix, kind) for kind in kinds or KINDS]
        changed = asyncio.Event()
        merged = MergedView(self._settings.grace_s)
        tasks = []
        for (host, _), stub in zip(self._settings.addresses, self._stubs(), strict=True):
            view = HostView(host, self._settings.prefix)
            merged.views.append(view)
            tasks.append(
                asyncio.create_task(self._follow(stub, services, merged, view, changed), name="registry-watch")
            )
        self._watchers.add(changed)
        patience_ends = loop.time() + FIRST_ANSWER_S
        last: Snapshot | None = None
        try:
            while not self._closed:
                with contextlib.suppress(TimeoutError):
                    # A hold ends and youth passes without a word from anybody.
                    idle = last is not None and not last.young and not merged.holding
                    async with asyncio.timeout(None if idle else 0.25):
                        await changed.wait()
                changed.clear()
                if not merged.known and loop.time() < patience_ends:
                    continue
                snapshot = merged.snapshot(loop.time())
                if snapshot != last:
                    last = snapshot
                    yield snapshot
        finally:
            self._watchers.discard(changed)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(
        self, stub: Any, services: list[str], merged: MergedView, view: HostView, changed: asyncio.Event
    ) -> None:
        async def listen() -> None:
            call = stub.Watch(pb.WatchRequest(services=services))
            try:
                while (reply := await call.read()) is not grpc.aio.EOF:
                    listed = [Listed(to_line(entry.registration), entry.suspect) for entry in reply.entries]
                    merged.heard(view, listed, reply.age_ms / 1000, asyncio.get_running_loop().time())
                    changed.set()
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) and task.cancelling():
                    raise
            finally:
                call.cancel()
            raise ConnectionError("the registry ended the stream")

        def lost(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if view.live or not view.known:
                log.warning("a registry is out of reach (%s)", brief(error))
            merged.lost(view)
            changed.set()

        while True:
            try:
                await patiently(LOST, lost, most_s=1.0)(listen)
            except Exception:
                log.exception("reading a registry failed; it goes on")
                merged.lost(view)
                changed.set()
                await asyncio.sleep(1.0)

    async def close(self) -> None:
        """Stops watching; streams of registrations break, so those become suspect, not deregistered."""
        self._closed = True
        for changed in self._watchers:
            changed.set()
        for stays in self._stays.values():
            await asyncio.gather(*(stay.end() for stay in stays))
        self._stays.clear()
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    def _stubs(self) -> list[Any]:
        # Lazily: a grpc.aio channel belongs to the loop that it was made in.
        if not self._channels:
            for host, port in self._settings.addresses:
                target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                options = channel_options()
                secure = self._settings.credentials
                self._channels.append(
                    grpc.aio.secure_channel(target, secure, options=options)
                    if secure
                    else grpc.aio.insecure_channel(target, options=options)
                )
        return [pb_grpc.RegistryServiceStub(channel) for channel in self._channels]
