"""The client for programs without asyncio in direct mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from infermesh.client import addresses as where
from infermesh.client import direct
from infermesh.client.results import Chunk, Completion, Served, served
from infermesh.client.sync import Client
from infermesh.client.sync_calls import pairs
from infermesh.errors import MeshError
from infermesh.transport import open_channel, trust
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1.mesh_pb2_grpc import MeshServiceStub


class DirectClient(Client):
    """`AsyncDirectClient` for synchronous programs; one may be shared by threads. See there."""

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
        self._lines: dict[tuple[str, bool, str], grpc.Channel] = {}
        self._reports: set[grpc.Future] = set()

    def close(self) -> None:
        """Waits for the reports that are on their way."""
        for report in list(self._reports):
            report.exception()
        with self._lock:
            lines, self._lines = list(self._lines.values()), {}
        for line in lines:
            line.close()
        super().close()

    def _unary(self, method: Callable[[grpc.Channel], Any], request: Any, timeout: float | None) -> tuple[Any, Served]:
        if type(request) not in direct.KINDS:
            return super()._unary(method, request, timeout)
        left, tries = self._clock(timeout), direct.Tries()
        while True:
            picked, gateway = self._pick(request, left(), tries)
            failure: BaseException | None = None
            usage = None
            try:
                call = method(self._line(picked)).with_call
                reply, ended = call(request, timeout=left(), metadata=direct.metadata(picked))
                usage = reply.usage
                return reply, tries.served(served(pairs(ended.initial_metadata())), picked)
            except grpc.RpcError as error:
                failure = self._failed(picked, error)
                if not tries.again(picked, failure, begun=False):
                    raise failure from None
            except BaseException as error:
                failure = error
                raise
            finally:
                self._report(gateway, direct.report(picked, failure, usage))

    def _stream(
        self,
        method: Callable[[grpc.Channel], Any],
        request: Any,
        timeout: float | None,
        begin: type[Completion] = Completion,
        *,
        whole: bool = False,
    ) -> Iterator[Chunk]:
        if type(request) not in direct.KINDS:
            yield from super()._stream(method, request, timeout, begin, whole=whole)
            return
        left, tries = self._clock(timeout), direct.Tries()
        while True:
            picked, gateway = self._pick(request, left(), tries)
            call = method(self._line(picked))(request, timeout=left(), metadata=direct.metadata(picked))
            answer, begun = begin(), False
            failure: BaseException | None = MeshError(direct.Reason.CANCELLED, "the caller left")
            try:
                for event in call:
                    if not begun:
                        begun = True
                        answer.served = tries.served(served(pairs(call.initial_metadata())), picked)
                    yield Chunk(answer.add(event), answer)
                failure = None
                return
            except grpc.RpcError as error:
                failure = lost = self._failed(picked, error, got=answer.got if begun and not whole else "")
                if not tries.again(picked, lost, begun=begun and not whole):
                    raise lost from None
            finally:
                call.cancel()
                self._report(gateway, direct.report(picked, failure, answer.usage))

    def _pick(self, request: Any, timeout: float | None, tries: direct.Tries) -> tuple[ms.PickResponse, int]:
        """Whom to call, and the gateway that said so; the request carries the reservation from then on."""
        request.ClearField("relay")
        wish = direct.pick_request(request, tries.avoid)
        try:
            picked, _ = super()._unary(lambda channel: MeshServiceStub(channel).Pick, wish, timeout)
        except MeshError as refused:
            raise tries.told(refused) from None
        request.relay.CopyFrom(picked.relay)
        return picked, self._rotation.order()[0]

    def _line(self, picked: ms.PickResponse) -> grpc.Channel:
        tls = direct.trusted(picked, self._instances_tls)
        key = direct.line(picked)
        with self._lock:
            if key not in self._lines:
                self._lines[key] = open_channel(picked.address, self._options, tls)
            return self._lines[key]

    def _failed(self, picked: ms.PickResponse, error: Any, *, got: str = "") -> MeshError:
        failure = direct.as_error(picked, error, got=got)
        if failure.reason in direct.BROKEN:  # whoever comes to this address later is dialled anew
            with self._lock:
                self._lines.pop(direct.line(picked), None)
        return failure

    def _report(self, gateway: int, report: ms.ReportRequest) -> None:
        """In the background: the caller has his answer, and a lease that nobody reports ends all the same."""
        stub: Any = MeshServiceStub(self._channel(gateway))
        sent = stub.Report.future(report, timeout=direct.REPORT_S, metadata=self._metadata)
        self._reports.add(sent)
        sent.add_done_callback(self._reports.discard)

    def _clock(self, timeout: float | None) -> Callable[[], float | None]:
        """Seconds that are left of a call that begins now."""
        seconds, started = self._seconds(timeout), time.monotonic()
        return lambda: None if seconds is None else seconds - (time.monotonic() - started)
