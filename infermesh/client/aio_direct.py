"""The client for asyncio in direct mode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc.aio

from infermesh.client import addresses as where
from infermesh.client import direct
from infermesh.client.aio import AsyncClient
from infermesh.client.aio_calls import pairs
from infermesh.client.results import Chunk, Completion, Served, served
from infermesh.errors import MeshError
from infermesh.transport import open_aio_channel, trust
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1.mesh_pb2_grpc import MeshServiceStub


class AsyncDirectClient(AsyncClient):
    """`AsyncClient` whose chat, complete, embed and rerank go straight to the instance that a gateway chooses; all else
    is the gateway's, `embed_stream` and `answer` among it. Instances must be within reach. One that is lost before its
    answer began is replaced; a stream under way is not resumed.

    `instances_ca_file`, `instances_tls_name`: as `ca_file` and `tls_name`, for instances that serve over TLS.
    """

    def __init__(
        self,
        addresses: str | Sequence[str] = where.DEFAULT,
        *,
        instances_ca_file: str = "",
        instances_tls_name: str = "",
        **options: Any,
    ) -> None:
        super().__init__(addresses, **options)
        self._instances_tls = trust(instances_ca_file, instances_tls_name)
        self._lines: dict[tuple[str, bool, str], grpc.aio.Channel] = {}
        self._reports: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Waits for the reports that are on their way."""
        await asyncio.gather(*self._reports)
        lines, self._lines = list(self._lines.values()), {}
        await asyncio.gather(*(line.close() for line in lines), super().close())

    async def _unary(
        self, method: Callable[[grpc.aio.Channel], Any], request: Any, timeout: float | None
    ) -> tuple[Any, Served]:
        if type(request) not in direct.KINDS:
            return await super()._unary(method, request, timeout)
        left, tries = self._clock(timeout), direct.Tries()
        while True:
            picked, gateway = await self._pick(request, left(), tries)
            call = method(self._line(picked))(request, timeout=left(), metadata=direct.metadata(picked))
            failure: BaseException | None = None
            usage = None
            try:
                reply = await call
                usage = reply.usage
                return reply, tries.served(served(pairs(await call.initial_metadata())), picked)
            except grpc.aio.AioRpcError as error:
                failure = self._failed(picked, error)
                if not tries.again(picked, failure, begun=False):
                    raise failure from None
            except BaseException as error:
                failure = error
                raise
            finally:
                self._report(gateway, direct.report(picked, failure, usage))

    async def _stream(
        self,
        method: Callable[[grpc.aio.Channel], Any],
        request: Any,
        timeout: float | None,
        begin: type[Completion] = Completion,
        *,
        whole: bool = False,
    ) -> AsyncIterator[Chunk]:
        if type(request) not in direct.KINDS:
            async with aclosing(super()._stream(method, request, timeout, begin, whole=whole)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
            return
        left, tries = self._clock(timeout), direct.Tries()
        while True:
            picked, gateway = await self._pick(request, left(), tries)
            call = method(self._line(picked))(request, timeout=left(), metadata=direct.metadata(picked))
            answer, begun = begin(), False
            failure: BaseException | None = MeshError(direct.Reason.CANCELLED, "the caller left")
            try:
                async for event in call:
                    if not begun:
                        begun = True
                        answer.served = tries.served(served(pairs(await call.initial_metadata())), picked)
                    yield Chunk(answer.add(event), answer)
                failure = None
                return
            except grpc.aio.AioRpcError as error:
                failure = lost = self._failed(picked, error, got=answer.got if begun and not whole else "")
                if not tries.again(picked, lost, begun=begun and not whole):
                    raise lost from None
            finally:
                call.cancel()
                self._report(gateway, direct.report(picked, failure, answer.usage))

    async def _pick(self, request: Any, timeout: float | None, tries: direct.Tries) -> tuple[ms.PickResponse, int]:
        """Whom to call, and the gateway that said so; the request carries the reservation from then on."""
        request.ClearField("relay")
        wish = direct.pick_request(request, tries.avoid)
        try:
            picked, _ = await super()._unary(lambda channel: MeshServiceStub(channel).Pick, wish, timeout)
        except MeshError as refused:
            raise tries.told(refused) from None
        request.relay.CopyFrom(picked.relay)
        return picked, self._rotation.order()[0]

    def _line(self, picked: ms.PickResponse) -> grpc.aio.Channel:
        tls = direct.trusted(picked, self._instances_tls)
        key = direct.line(picked)
        if key not in self._lines:
            self._lines[key] = open_aio_channel(picked.address, self._options, tls)
        return self._lines[key]

    def _failed(self, picked: ms.PickResponse, error: grpc.aio.AioRpcError, *, got: str = "") -> MeshError:
        failure = direct.as_error(picked, error, got=got)
        if failure.reason in direct.BROKEN:  # whoever comes to this address later is dialled anew
            self._lines.pop(direct.line(picked), None)
        return failure

    def _report(self, gateway: int, report: ms.ReportRequest) -> None:
        """In the background: the caller has his answer, and a lease that nobody reports ends all the same."""
        task = asyncio.create_task(self._tell(gateway, report))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _tell(self, gateway: int, report: ms.ReportRequest) -> None:
        stub = MeshServiceStub(self._channel(gateway))
        try:
            await stub.Report(report, timeout=direct.REPORT_S, metadata=self._metadata)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return

    def _clock(self, timeout: float | None) -> Callable[[], float | None]:
        """Seconds that are left of a call that begins now."""
        seconds, started = self._seconds(timeout), asyncio.get_running_loop().time()
        return lambda: None if seconds is None else seconds - (asyncio.get_running_loop().time() - started)
