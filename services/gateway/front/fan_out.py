"""Calls of the mesh behind one request of a caller: one unary call, or several as one sequence of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from infermesh.errors import MeshError, Reason
from services.gateway.front.disconnect import Attended
from services.gateway.front.rest_exchange import Exchange
from services.gateway.front.rooted import rooted
from services.gateway.upstream.calls import Call, Identity, Method

WIDTH = 32  # calls of one request that run at once
_AHEAD = 64  # events read before the caller has taken them

Happening = tuple[int, Identity, Any]


async def unary(exchange: Exchange, method: Method, request: Any) -> tuple[Any, Identity]:
    """The one answer of a unary method, unless the client leaves before."""
    with Attended(exchange.receive):
        async with exchange.open(method, request, exchange.call()) as reply:
            async for event in reply:
                return event.message, reply.identity
    raise MeshError(Reason.INTERNAL, "the instance ended the call without an answer")


async def events(
    exchange: Exchange, method: Method, requests: Sequence[Any], call: Call
) -> AsyncGenerator[Happening, None]:
    """(index of the request, who answers it, message), in order for each request. Close it: `aclosing`.

    The first error ends all of them.
    """
    if len(requests) == 1:
        async with exchange.open(method, requests[0], call) as reply:
            async for event in reply:
                yield 0, reply.identity, event.message
        return
    with rooted(exchange.watcher, call) as part:
        async with aclosing(_together(exchange, method, requests, part)) as happenings:
            async for happening in happenings:
                yield happening


async def _together(
    exchange: Exchange, method: Method, requests: Sequence[Any], call: Call
) -> AsyncGenerator[Happening, None]:
    queue: asyncio.Queue[Happening | Exception | None] = asyncio.Queue(_AHEAD)
    waiting = iter(range(len(requests)))

    async def work() -> None:
        for index in waiting:
            try:
                # Request ids reach the engines, where one id is one request.
                own = replace(call, request_id=f"{call.request_id[:120]}-{index}")
                async with exchange.open(method, requests[index], own) as reply:
                    async for event in reply:
                        await queue.put((index, reply.identity, event.message))
            except Exception as error:
                await queue.put(error)
                return
            await queue.put(None)

    workers = [asyncio.create_task(work()) for _ in range(min(WIDTH, len(requests)))]
    try:
        left = len(requests)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
