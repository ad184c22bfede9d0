"""Keeps classes of instances at the number that the gateway wants (docs/decisions/0033)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from deploy.launch.replicas import Replicas

EVERY_S = 2.0
ASK_S = 5.0

Wanted = Callable[[], Awaitable[Mapping[str, int]]]  # class -> replicas; one without an opinion is not in it


@contextlib.asynccontextmanager
async def followed(replicas: Replicas, wanted: Wanted, say: Callable[[str], None]) -> AsyncIterator[None]:
    """Classes are scaled until the end of the block."""
    task = asyncio.create_task(follow(replicas, wanted, say)) if replicas.scaled else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            await asyncio.wait({task})


async def follow(replicas: Replicas, wanted: Wanted, say: Callable[[str], None]) -> None:
    """Until it is cancelled. A gateway that does not answer changes nothing: it may be starting again."""
    silent = False
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            async with asyncio.timeout(ASK_S):
                told = await wanted()
        except Exception as error:
            if not silent:
                say(f"infermesh: the gateway does not say how many replicas it wants ({error}): nothing is scaled")
            silent = True
            continue
        silent = False
        for id in replicas.scaled & told.keys():
            before = replicas.count(id)
            if (after := await replicas.set(id, told[id])) != before:
                say(f"[{id}] {before} -> {after} replicas, as the gateway wants")
