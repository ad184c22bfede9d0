"""A Consul that misbehaves on demand: the real one cannot be told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from registry.endpoint import Endpoint, to_metadata

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeConsul:
    """Answers health queries with whatever `answer` does; counts them."""

    def __init__(self) -> None:
        self.answer: Handler = self.fine
        self.known: list[str] = ["a", "b"]
        self.index = 100
        self.queries: list[tuple[float, dict[str, str]]] = []
        self.put_status = 200

    async def fine(self, request: web.Request) -> web.StreamResponse:
        if int(request.query.get("index", 0)) == self.index:
            await asyncio.sleep(0.2)
        return web.json_response([self.node(id) for id in self.known], headers={"X-Consul-Index": str(self.index)})

    @staticmethod
    def node(id: str) -> dict[str, Any]:
        meta = to_metadata(Endpoint(id, "llm", "127.0.0.1", 1, "m", incarnation=1))
        service = {"ID": id, "Address": "127.0.0.1", "Port": 1, "Meta": meta, "CreateIndex": 1}
        return {"Node": {"Address": "127.0.0.1"}, "Service": service, "Checks": []}

    async def health(self, request: web.Request) -> web.StreamResponse:
        self.queries.append((time.monotonic(), dict(request.query)))
        return await self.answer(request)

    async def put(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=self.put_status, text="told so")
