"""How `AsyncClient` calls: which gateway, over what, and when the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

import grpc
import grpc.aio

from infermesh.client import addresses as where
from infermesh.client.results import Chunk, Completion, Served, served
from infermesh.transport import channel_options, open_aio_channel, trust


class AsyncCalls:
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
        self._channels: dict[int, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))

    def _channel(self, index: int) -> grpc.aio.Channel:
        if index not in self._channels:
            self._channels[index] = open_aio_channel(self.addresses[index], self._options, self._tls)
        return self._channels[index]

    def _seconds(self, timeout: float | None) -> float | None:
        return self.timeout if timeout is None else timeout

    def _error(self, error: grpc.aio.AioRpcError, *, got: str = "") -> Exception:
        return where.as_error(error, self.addresses, got=got)

    async def _unary(
        self, method: Callable[[grpc.aio.Channel], Any], request: Any, timeout: float | None
    ) -> tuple[Any, Served]:
        seconds = self._seconds(timeout)
        started = asyncio.get_running_loop().time()
        order = self._rotation.order()
        for index in order:
            left = None if seconds is None else seconds - (asyncio.get_running_loop().time() - started)
            call = method(self._channel(index))(request, timeout=left, metadata=self._metadata)
            try:
                reply = await call
            except grpc.aio.AioRpcError as error:
                if index != order[-1] and where.try_next(error):
                    continue
                raise self._error(error) from None
            self._rotation.answered(index)
            return reply, served(pairs(await call.initial_metadata()))
        raise AssertionError("there is at least one address")

    async def _stream(
        self,
        method: Callable[[grpc.aio.Channel], Any],
        request: Any,
        timeout: float | None,
        begin: type[Completion] = Completion,
        *,
        whole: bool = False,
    ) -> AsyncIterator[Chunk]:
        """`whole`: nobody has seen any of it before its end, so that another gateway may begin it anew."""
        seconds = self._seconds(timeout)
        started = asyncio.get_running_loop().time()
        order = self._rotation.order()
        for index in order:
            left = None if seconds is None else seconds - (asyncio.get_running_loop().time() - started)
            call = method(self._channel(index))(request, timeout=left, metadata=self._metadata)
            answer, begun = begin(), False
            try:
                async for event in call:
                    if not begun:
                        begun = True
                        self._rotation.answered(index)
                        answer.served = served(pairs(await call.initial_metadata()))
                    yield Chunk(answer.add(event), answer)
                answer.served = answer.served.at_the_end(pairs(await call.trailing_metadata()))
                return
            except grpc.aio.AioRpcError as error:
                again = (whole or not begun) and index != order[-1]
                if again and where.try_next(error):
                    continue
                raise self._error(error, got=answer.got if begun else "") from None
            finally:
                call.cancel()

    async def _collect(
        self,
        method: Callable[[grpc.aio.Channel], Any],
        request: Any,
        timeout: float | None,
        begin: type[Completion] = Completion,
    ) -> Completion:
        answer = begin()
        async for chunk in self._stream(method, request, timeout, begin, whole=True):
            answer = chunk.so_far
        return answer

    async def _reach(self) -> int:
        """The first gateway that serves: a client stream cannot be sent twice."""
        for index in self._rotation.order():
            check: Any = self._channel(index).unary_unary(where.HEALTH)
            try:
                if await check(b"", timeout=where.PROBE_S) != where.SERVING:
                    continue
            except grpc.aio.AioRpcError as error:
                if error.code() in where.AWAY:
                    continue
            self._rotation.answered(index)
            return index
        raise where.unreachable(self.addresses, "no connection")


def pairs(metadata: Any) -> list[tuple[str, str | bytes]]:
    return [(item[0], item[1]) for item in metadata or ()]
