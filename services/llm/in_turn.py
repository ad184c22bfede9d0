"""A prompt that may be overtaken: until its first token it can be taken out of the engine, and put in again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace

from services.chassis.room import Turn
from services.llm.engine import Event


async def in_turn(begin: Callable[[], AsyncIterator[Event]], turn: Turn, cached: int) -> AsyncGenerator[Event]:
    """The events of one of the answers that `begin` starts. Each time the prompt is overtaken the answer is closed, and
    begun again when its turn has come: what the engine has computed of it is in its prefix cache then. That is not
    what the caller calls cached, so no more than `cached` tokens are told to be, as the gateway had expected."""
    moved = 0
    while True:
        while not turn.mine.is_set():
            await turn.mine.wait()
        async with aclosing(begin()) as events:  # type: ignore[type-var]
            first = asyncio.ensure_future(next_event(events))
            overtaken = turn.leave = _Once(first.cancel)
            try:
                await asyncio.wait({first})
            finally:
                turn.leave = None
                while not first.done():
                    first.cancel()
                    with suppress(asyncio.CancelledError):  # we end anyway; the engine's part of it first
                        await asyncio.wait({first})
            if first.cancelled() and overtaken.called:
                moved += 1
                continue
            event = first.result()
            while event is not None:
                yield _told(event, moved, cached) if moved else event
                event = await next_event(events)
            return


class _Once:
    """Calls, and knows that it was called: who else cancels the engine's answer ends it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.called = False

    def __call__(self) -> None:
        self.called = True
        self._call()


async def next_event(events: AsyncIterator[Event]) -> Event | None:
    """None at the end. Unlike `anext` itself, it makes a task."""
    return await anext(events, None)


def _told(event: Event, moved: int, cached: int) -> Event:
    if event.prompt is not None:
        event.prompt = replace(event.prompt, cached=min(cached, event.prompt.cached), preempted=moved)
    if event.usage is not None:
        event.usage.cached_tokens = min(cached, event.usage.cached_tokens)
    return event
