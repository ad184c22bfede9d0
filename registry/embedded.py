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
from registry.directory import Line, Listed
from registry.embedded_watch import HostView, MergedView
from registry.endpoint import KINDS, Endpoint, to_metadata
from registry.host import from_line, to_line
from registry.patience import jitter, patiently
from registry.port import RegistryError, Snapshot, check_registrable

log = logging.getLogger("infermesh.registry.mesh")

FIRST_ANSWER_S: Final = 2.0
RENEW_S: Final = 0.8  # the registry suspects after 2.5 s of silence
WRITE_S: Final = 2.0
_REFUSALS: Final = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)
_LOST: Final[tuple[type[BaseException], ...]] = (grpc.RpcError, ConnectionError, TimeoutError)


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """`addresses`: (host, port) of each registry. `operator_key` is what `Register` needs where keys are set.
    `credentials`: TLS; None = plaintext."""

    addresses: tuple[tuple[str, int], ...]
    prefix: str = "infermesh"
    operator_key: str | None = None
    credentials: grpc.ChannelCredentials | None = None
    grace_s: float = 10.0


class _Refused(Exception):
    """The registry does not want this registration; trying again would not help."""


class _Stay:
    """One endpoint at one registry."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.changed = asyncio.Event()
        self.leaving = False
        self.tried: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # "" = in, or away; else refused
        self.task: asyncio.Task[None] | None = None
        self.trouble = ""

    def settle(self, refused: str = "") -> None:
        if not self.tried.done():
            self.tried.set_result(refused)


class MeshRegistry:
    """See `registry.port.Registry`."""

    def __init__(self, settings: MeshSettings) -> None:
        self._settings = settings
        self._channels: list[grpc.aio.Channel] = []
        self._stays: dict[str, list[_Stay]] = {}
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    @property
    def address(self) -> tuple[str, int]:
        return self._settings.addresses[0]

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

    # -- being known ---------------------------------------------------------------------------------------------

    async def register(self, endpoint: Endpoint) -> None:
        check_registrable(endpoint)
        await self._end(self._stays.pop(endpoint.id, []))
        stays = self._stays[endpoint.id] = []
        for stub in self._stubs():
            stay = _Stay(endpoint)
            stay.task = asyncio.create_task(self._stay(stub, stay), name=f"registry-stay-{endpoint.id}")
            stays.append(stay)
        await asyncio.wait([stay.tried for stay in stays], timeout=WRITE_S)
        refused = [stay.tried.result() for stay in stays if stay.tried.done() and stay.tried.result()]
        if refused:
            self._stays.pop(endpoint.id, None)
            await self._end(stays)
            raise RegistryError(refused[0])

    async def renew(self, endpoint: Endpoint) -> None:
        check_registrable(endpoint)
        if endpoint.id not in self._stays:
            raise RegistryError(f"{endpoint.id} is not registered; call register first")
        for stay in self._stays[endpoint.id]:
            stay.endpoint = endpoint
            stay.changed.set()

    async def deregister(self, id: str) -> None:
        stays = self._stays.pop(id, [])
        for stay in stays:
            stay.leaving = True
            stay.changed.set()
        tasks = [stay.task for stay in stays if stay.task]
        if tasks:
            await asyncio.wait(tasks, timeout=WRITE_S)
        await self._end(stays)

    async def _stay(self, stub: Any, stay: _Stay) -> None:
        """Keeps one endpoint at one registry, for ever or until it leaves."""

        def note(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            self._note(stay, f"registry out of reach ({brief(error)}); goes on trying")
            stay.settle()

        while not stay.leaving:
            try:
                await patiently(_LOST, note, first_s=0.2, most_s=1.0)(self._session, stub, stay)
            except _Refused as error:
                stay.settle(str(error))
                self._note(stay, str(error))
                if str(error).startswith("superseded"):
                    return
                await asyncio.sleep(jitter(5.0))  # an operator may mend a key; a full registry may empty
            except Exception:
                log.exception("%s: keeping the registration failed; it goes on", stay.endpoint.id)
                stay.settle()
                await asyncio.sleep(1.0)

    async def _session(self, stub: Any, stay: _Stay) -> None:
        """One stream's life. Ends by itself only after a goodbye."""
        if stay.leaving:
            return
        key = self._settings.operator_key
        call = stub.Register(metadata=[("authorization", f"Bearer {key}")] if key else None)
        reading: asyncio.Future[Any] | None = None
        try:
            stay.changed.clear()
            await self._write(call, pb.RegisterRequest(registration=self._line(stay.endpoint)))
            while True:
                reading = reading or asyncio.ensure_future(call.read())
                waking = asyncio.ensure_future(stay.changed.wait())
                await asyncio.wait([reading, waking], timeout=jitter(RENEW_S), return_when=asyncio.FIRST_COMPLETED)
                waking.cancel()
                if reading.done():
                    if reading.cancelled():  # grpc.aio's way to say that the other side cancelled
                        raise ConnectionError("the stream was cancelled")
                    reply, reading = reading.result(), None
                    if reply is grpc.aio.EOF:
                        raise ConnectionError(f"the registry ended the stream: {await call.details() or 'no reason'}")
                    if not reply.accepted:
                        raise _Refused(reply.rejected_reason or "refused by the registry")
                    self._note(stay, "")
                    stay.settle()
                if stay.leaving:
                    await self._write(call, pb.RegisterRequest(goodbye=True))
                    await call.done_writing()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(call.code(), WRITE_S)
                    return
                frame = pb.RegisterRequest()
                if stay.changed.is_set():
                    stay.changed.clear()
                    frame.registration.CopyFrom(self._line(stay.endpoint))
                await self._write(call, frame)
        except grpc.RpcError as error:
            if error.code() in _REFUSALS:
                raise _Refused(f"the registry refuses: {error.details()}") from error
            raise
        except asyncio.InvalidStateError:
            # Writing to a call that has ended says nothing about why; its status does.
            if (code := await call.code()) in _REFUSALS:
                raise _Refused(f"the registry refuses: {await call.details()}") from None
            raise ConnectionError(f"{code.name}: {await call.details()}") from None
        finally:
            if reading:
                reading.cancel()
            call.cancel()

    @staticmethod
    async def _write(call: Any, frame: pb.RegisterRequest) -> None:
        async with asyncio.timeout(WRITE_S):
            await call.write(frame)

    def _line(self, endpoint: Endpoint) -> pb.Registration:
        name = service_name(self._settings.prefix, endpoint.kind)
        return from_line(Line(name, endpoint.id, endpoint.host, endpoint.port, to_metadata(endpoint)))

    def _note(self, stay: _Stay, trouble: str) -> None:
        if trouble and trouble != stay.trouble:
            log.warning("%s: %s", stay.endpoint.id, trouble)
        stay.trouble = trouble

    @staticmethod
    async def _end(stays: list[_Stay]) -> None:
        tasks = [stay.task for stay in stays if stay.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- knowing others ------------------------------------------------------------------------------------------

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
                    await asyncio.wait_for(changed.wait(), None if idle else 0.25)
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
            view.lost()
            changed.set()

        while True:
            try:
                await patiently(_LOST, lost, first_s=0.2, most_s=1.0)(listen)
            except Exception:
                log.exception("reading a registry failed; it goes on")
                view.lost()
                changed.set()
                await asyncio.sleep(1.0)

    async def close(self) -> None:
        """Stops watching; streams of registrations break, so those become suspect, not deregistered."""
        self._closed = True
        for changed in self._watchers:
            changed.set()
        for stays in self._stays.values():
            await self._end(stays)
        self._stays.clear()
        for channel in self._channels:
            await channel.close()
        self._channels.clear()


def brief(error: BaseException | None) -> str:
    """An error in one line. RpcError's own text is half a page."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"[:200]
    return (f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)[:200]
