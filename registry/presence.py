"""register -> serve -> drain -> deregister, as one async context manager."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from registry.advertise import advertised
from registry.endpoint import Endpoint
from registry.port import Registry

__all__ = ["Departure", "Presence", "advertised", "present"]

log = logging.getLogger("infermesh.registry.presence")


@dataclass(frozen=True, slots=True)
class Departure:
    """How an instance leaves. `settle_s`: how long calls may still arrive from those who have not heard yet;
    `grace_s`: how long running work may take to finish."""

    settle_s: float = 1.0
    grace_s: float = 30.0


class Presence:
    """One endpoint in its registries, while it is there."""

    def __init__(
        self, registries: Sequence[Registry], endpoint: Endpoint, serving: Callable[[bool], Awaitable[None]]
    ) -> None:
        self.endpoint = endpoint
        self.left = asyncio.Event()
        self._registries = tuple(registries)
        self._serving = serving
        self._going: asyncio.Task[None] | None = None

    async def enter(self) -> None:
        """Health first, registries after: nobody must be sent to an instance whose own health says no.

        Raises:
            RegistryError: a registry refuses for good. Nothing stays registered then.
        """
        await self._serving(True)
        asked = await asyncio.gather(
            *(registry.register(self.endpoint) for registry in self._registries), return_exceptions=True
        )
        if failed := [error for error in asked if isinstance(error, BaseException)]:
            await self.leave()
            raise failed[0]

    async def renew(self, **changes: Any) -> None:
        """Changes fields of the endpoint, e.g. `speed=...`; after leaving it does nothing."""
        if self._going:
            return
        self.endpoint = replace(self.endpoint, **changes)
        await asyncio.gather(*(registry.renew(self.endpoint) for registry in self._registries))

    async def leave(self) -> None:
        """No new work from now on: health says no, the registries forget. May be called early and often (`Drain`)."""
        if self._going is None:
            self._going = asyncio.create_task(self._leave(), name="presence-leave")
        await asyncio.shield(self._going)

    async def _leave(self) -> None:
        try:
            await self._serving(False)
        except Exception:
            log.exception("flipping health failed; leaving all the same")
        await asyncio.gather(
            *(registry.deregister(self.endpoint.id) for registry in self._registries), return_exceptions=True
        )
        self.left.set()


@asynccontextmanager
async def present(
    registries: Sequence[Registry],
    endpoint: Endpoint,
    *,
    serving: Callable[[bool], Awaitable[None]],
    drain: Callable[[float], Awaitable[None]],
    departure: Departure = Departure(),
) -> AsyncIterator[Presence]:
    """The endpoint is known while the body runs.

    Args:
        registries: where to be known; they stay open, closing them is the caller's.
        serving: flips the process's own health.
        drain: given the seconds that are left, finishes or hands over what runs. Runs also when the body failed.

    On the way out: health says NOT_SERVING, registries are left, `settle_s` passes (requests sent before the word got
    round are still served), then `drain(grace_s)`. Cancelling during that is the hard stop.

    Raises:
        RegistryError: a registry refuses for good.
    """
    presence = Presence(registries, endpoint, serving)
    await presence.enter()
    try:
        yield presence
    finally:
        await presence.leave()
        await asyncio.sleep(departure.settle_s)
        await drain(departure.grace_s)
