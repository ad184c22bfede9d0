"""Cancels the work for a client that has gone away. ASGI servers tell, but only to those who ask."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any


class ClientGone(Exception):
    """Nobody is left to answer."""


class Attended:
    """`with Attended(receive):` cancels the current task when the client hangs up, and raises ClientGone then.

    Enter it when the body has been read: nothing but the disconnect is expected from `receive` any more. Leave it
    before the last byte of the reply is sent, since servers report a finished exchange as a disconnect too.
    """

    __slots__ = ("_gone", "_receive", "_task", "_watcher")

    def __init__(self, receive: Any) -> None:
        self._receive = receive
        self._gone = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.create_task(self._watch())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._watcher.cancel()
        if not self._gone:
            return
        # Somebody else's cancellation stays pending; the watcher's own ends here.
        others = self._task.uncancel()
        if kind is None or (issubclass(kind, asyncio.CancelledError) and not others):
            raise ClientGone from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()
