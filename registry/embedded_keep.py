"""Being known to one embedded registry: a stream that is the registration, reopened for ever until goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Final

import grpc
from tenacity import RetryCallState

from infermesh.v1 import registry_pb2 as pb
from registry.consul_wire import service_name
from registry.directory import Line
from registry.endpoint import Endpoint, to_metadata
from registry.host import from_line
from registry.patience import jitter, patiently

log = logging.getLogger("infermesh.registry.mesh")

RENEW_S: Final = 0.8  # the registry suspects after 2.5 s of silence
WRITE_S: Final = 2.0
LOST: Final[tuple[type[BaseException], ...]] = (grpc.RpcError, ConnectionError, TimeoutError)
_REFUSALS: Final = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)


class _Refused(Exception):
    """The registry does not want this registration; trying again at once would not help."""


class Stay:
    """One endpoint at one registry. `tried` is done after the first attempt: "" = in, or the registry is away; else why
    it refused."""

    def __init__(self, stub: Any, prefix: str, endpoint: Endpoint, operator_key: str | None) -> None:
        self.tried: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._stub = stub
        self._prefix = prefix
        self._endpoint = endpoint
        self._key = operator_key
        self._changed = asyncio.Event()
        self._leaving = False
        self._trouble = ""
        self._task = asyncio.create_task(self._run(), name=f"registry-stay-{endpoint.id}")

    def change(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._changed.set()

    async def leave(self) -> None:
        """Says goodbye if the registry can be reached, within `WRITE_S`."""
        self._leaving = True
        self._changed.set()
        await asyncio.wait([self._task], timeout=WRITE_S)
        await self.end()

    async def end(self) -> None:
        """Stops without a goodbye: the line becomes suspect."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        def note(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            self._note(f"a registry is out of reach ({brief(error)}); goes on trying")
            self._settle("")

        while not self._leaving:
            try:
                await patiently(LOST, note, most_s=1.0)(self._session)
            except _Refused as error:
                self._settle(str(error))
                self._note(str(error))
                if str(error).startswith("superseded"):
                    return
                # A key may be mended, a full registry may empty.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(jitter(5.0)):
                        await self._changed.wait()
            except Exception:
                log.exception("%s: keeping the registration failed; it goes on", self._endpoint.id)
                self._settle("")
                await asyncio.sleep(1.0)

    async def _session(self) -> None:
        """One stream's life. Ends by itself only after a goodbye."""
        if self._leaving:
            return
        call = self._stub.Register(metadata=[("authorization", f"Bearer {self._key}")] if self._key else None)
        try:
            await self._talk(call)
        except grpc.RpcError as error:
            if error.code() in _REFUSALS:
                raise _Refused(f"the registry refuses: {error.details()}") from error
            raise
        except asyncio.CancelledError:
            # grpc.aio raises it also when the other side cancelled the stream; only our own task's ends the stay.
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise ConnectionError("the stream was cancelled") from None
        except asyncio.InvalidStateError:
            # Writing to a call that has ended says nothing about why; its status does.
            code, details = await call.code(), await call.details()
            if code in _REFUSALS:
                raise _Refused(f"the registry refuses: {details}") from None
            raise ConnectionError(f"{code.name}: {details}") from None
        finally:
            call.cancel()

    async def _talk(self, call: Any) -> None:
        self._changed.clear()
        await _write(call, pb.RegisterRequest(registration=self._registration()))
        reading: asyncio.Future[Any] | None = None
        try:
            while True:
                reading = reading or asyncio.ensure_future(call.read())
                waking = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait([reading, waking], timeout=jitter(RENEW_S), return_when=asyncio.FIRST_COMPLETED)
                waking.cancel()
                if reading.done():
                    await self._heard(call, reading)
                    reading = None
                if self._leaving:
                    await _write(call, pb.RegisterRequest(goodbye=True))
                    await call.done_writing()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(call.code(), WRITE_S)
                    return
                frame = pb.RegisterRequest()
                if self._changed.is_set():
                    self._changed.clear()
                    frame.registration.CopyFrom(self._registration())
                await _write(call, frame)
        finally:
            if reading:
                reading.cancel()

    async def _heard(self, call: Any, reading: asyncio.Future[Any]) -> None:
        reply = reading.result()
        if reply is grpc.aio.EOF:
            raise ConnectionError(f"the registry ended the stream: {await call.details() or 'no reason'}")
        if not reply.accepted:
            raise _Refused(reply.rejected_reason or "refused by the registry")
        self._note("")
        self._settle("")

    def _registration(self) -> pb.Registration:
        endpoint = self._endpoint
        name = service_name(self._prefix, endpoint.kind)
        return from_line(Line(name, endpoint.id, endpoint.host, endpoint.port, to_metadata(endpoint)))

    def _settle(self, refused: str) -> None:
        if not self.tried.done():
            self.tried.set_result(refused)

    def _note(self, trouble: str) -> None:
        """Says each trouble once."""
        if trouble and trouble != self._trouble:
            log.warning("%s: %s", self._endpoint.id, trouble)
        self._trouble = trouble


async def _write(call: Any, frame: pb.RegisterRequest) -> None:
    async with asyncio.timeout(WRITE_S):
        await call.write(frame)


def brief(error: BaseException | None) -> str:
    """An error in one line. RpcError's own text is half a page."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"[:200]
    return (f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)[:200]
