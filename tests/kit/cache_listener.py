"""A gateway's end of a Link that wants to know of the cache alone."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from infermesh.v1 import worker_pb2 as wk


class CacheListener:
    """`known`: the hashes that the instance holds, by its own word."""

    def __init__(self, stub: Any, name: str) -> None:
        self._stub = stub
        self._name = name
        self.frames: list[wk.Cache] = []
        self.known: set[int] = set()

    async def __aenter__(self) -> None:
        self._call = self._stub.Link()
        hello = wk.GatewayHello(gateway_id=self._name, load_interval_ms=20, features=["cache"])
        await self._call.write(wk.LinkRequest(hello=hello))
        self._task = asyncio.create_task(self._listen())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        self._call.cancel()

    async def _listen(self) -> None:
        while (frame := await self._call.read()) is not grpc.aio.EOF:
            if frame.WhichOneof("frame") == "cache":
                cache = frame.cache
                self.frames.append(cache)
                if cache.snapshot:
                    self.known.clear()
                self.known -= set(cache.removed)
                self.known |= set(cache.added)
