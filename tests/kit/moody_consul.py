"""A real Consul behind a door with moods: it answers late, half, wrongly or not at all, when told to.

async with MoodyConsul(consul.port()) as moody:
    moody.mood = "500"      # "", "429", "500", "slow", "half", "junk", "backwards"
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType

import aiohttp
from aiohttp import web

SLOW_S = 3.0


class MoodyConsul:
    """`queries` counts what was asked about health, in any mood. "slow" waits before each answer, "half" hangs in the
    middle of a body, "backwards" answers with index 1."""

    def __init__(self, port: int) -> None:
        self.mood = ""
        self.queries = 0
        self.port = 0
        self._behind = f"http://127.0.0.1:{port}"
        self._session: aiohttp.ClientSession
        self._runner: web.AppRunner

    @property
    def url(self) -> str:
        return f"consul://127.0.0.1:{self.port}"

    async def __aenter__(self) -> MoodyConsul:
        self._session = aiohttp.ClientSession(trust_env=False)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.queries += request.path.startswith("/v1/health/")
        if self.mood in ("429", "500"):
            return web.Response(status=int(self.mood), text="in no mood")
        if self.mood == "junk":
            return web.Response(text="<html>not Consul</html>", headers={"X-Consul-Index": "7"})
        if self.mood == "slow":
            await asyncio.sleep(SLOW_S)
        url, body = f"{self._behind}{request.path_qs}", await request.read()
        try:
            async with self._session.request(request.method, url, data=body, headers=_passed(request.headers)) as told:
                data, headers = await told.read(), _passed(told.headers)
        except aiohttp.ClientError:
            return web.Response(status=502)
        if self.mood == "backwards" and "X-Consul-Index" in headers:
            headers["X-Consul-Index"] = "1"
        if self.mood == "half" and len(data) > 10:
            reply = web.StreamResponse(status=told.status, headers={**headers, "Content-Length": str(len(data))})
            with suppress(ConnectionError):  # whoever asked may have lost patience
                await reply.prepare(request)
                await reply.write(data[: len(data) // 2])
                await asyncio.sleep(60)
            return reply
        return web.Response(status=told.status, body=data, headers=headers)


def _passed(headers: object) -> dict[str, str]:
    own = {"host", "content-length", "transfer-encoding", "connection", "content-encoding", "accept-encoding"}
    return {name: value for name, value in headers.items() if name.lower() not in own}  # type: ignore[attr-defined]
