"""How `Client` calls: which gateway, over what, and when the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import grpc

from infermesh.client import addresses as where
from infermesh.client.results import Chunk, Completion, Served, served
from infermesh.transport import channel_options, open_channel, trust


class Calls:
    """Calls to the gateways at `addresses`: to one, until it dies, then to the next."""

    def __init__(
        self,
        addresses: str | Sequence[str] = where.DEFAULT,
        *,
        api_key: str = "",
        timeout: float | None = 600,
        wan: bool = False,
        ca_file: str = "",
        tls_name: str = "",
    ) -> None:
        self.addresses, secure = where.split(addresses)
        self._tls = trust(ca_file, tls_name) if secure else None
        self.timeout = timeout
        self._metadata = where.metadata(api_key)
        self._rotation = where.Rotation(len(self.addresses))
        self._options = channel_options(wan=wan)
        self._lock = threading.Lock()
        self._channels: dict[int, grpc.Channel] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            channel.close()

    def _channel(self, index: int) -> grpc.Channel:
        with self._lock:
            if index not in self._channels:
                self._channels[index] = open_channel(self.addresses[index], self._options, self._tls)
            return self._channels[index]

    def _seconds(self, timeout: float | None) -> float | None:
        return self.timeout if timeout is None else timeout

    def _error(self, error: Any, *, got: str = "") -> Exception:
        return where.as_error(error, self.addresses, got=got)

    def _unary(self, method: Callable[[grpc.Channel], Any], request: Any, timeout: float | None) -> tuple[Any, Served]:
        seconds = self._seconds(timeout)
        started = time.monotonic()
        order = self._rotation.order()
        for index in order:
            left = None if seconds is None else seconds - (time.monotonic() - started)
            try:
                reply, call = method(self._channel(index)).with_call(request, timeout=left, metadata=self._metadata)
            except grpc.RpcError as failed:
                error: Any = failed
                if index != order[-1] and where.try_next(error):
                    continue
                raise self._error(error) from None
            self._rotation.answered(index)
            return reply, served(pairs(call.initial_metadata()))
        raise AssertionError("there is at least one address")

    def _stream(
        self,
        method: Callable[[grpc.Channel], Any],
        request: Any,
        timeout: float | None,
        begin: type[Completion] = Completion,
        *,
        whole: bool = False,
    ) -> Iterator[Chunk]:
        """`whole`: nobody has seen any of it before its end, so that another gateway may begin it anew."""
        seconds = self._seconds(timeout)
        started = time.monotonic()
        order = self._rotation.order()
        for index in order:
            left = None if seconds is None else seconds - (time.monotonic() - started)
            call = method(self._channel(index))(request, timeout=left, metadata=self._metadata)
            answer, begun = begin(), False
            try:
                for event in call:
                    if not begun:
                        begun = True
                        self._rotation.answered(index)
                        answer.served = served(pairs(call.initial_metadata()))
                    yield Chunk(answer.add(event), answer)
                answer.served = answer.served.at_the_end(pairs(call.trailing_metadata()))
                return
            except grpc.RpcError as failed:
                error: Any = failed
                again = (whole or not begun) and index != order[-1]
                if again and where.try_next(error):
                    continue
                raise self._error(error, got=answer.got if begun else "") from None
            finally:
                call.cancel()

    def _collect(
        self,
        method: Callable[[grpc.Channel], Any],
        request: Any,
        timeout: float | None,
        begin: type[Completion] = Completion,
    ) -> Completion:
        answer = begin()
        for chunk in self._stream(method, request, timeout, begin, whole=True):
            answer = chunk.so_far
        return answer

    def _reach(self) -> int:
        """The first gateway that serves: a client stream cannot be sent twice."""
        for index in self._rotation.order():
            check: Any = self._channel(index).unary_unary(where.HEALTH)
            try:
                if check(b"", timeout=where.PROBE_S) != where.SERVING:
                    continue
            except grpc.RpcError as failed:
                error: Any = failed
                if error.code() in where.AWAY:
                    continue
            self._rotation.answered(index)
            return index
        raise where.unreachable(self.addresses, "no connection")


def pairs(metadata: Any) -> list[tuple[str, str | bytes]]:
    return [(item[0], item[1]) for item in metadata or ()]
