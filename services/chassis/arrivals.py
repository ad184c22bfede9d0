"""The book of what is in flight in an instance: by gateway, for load frames; in all, for a drain."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from infermesh.v1.inference_pb2 import Relay
from services.chassis.room import Room, Turn


@dataclass(slots=True)
class Share:
    """What one gateway has here."""

    running: int = 0
    seen_seq: int = 0


class Entry:
    """One request in flight."""

    __slots__ = ("_number", "_room")

    def __init__(self, room: Room, number: int) -> None:
        self._room = room
        self._number = number

    @property
    def turn(self) -> Turn | None:
        """When its prompt may be in the engine; None: from now on."""
        return self._room.turn(self._number) if self._number else None

    def started(self) -> None:
        """Its prompt is computed; said again, it does nothing."""
        if self._number:
            self._room.started(self._number)


class Arrivals:
    def __init__(self, room: Room | None = None) -> None:
        self.room = room or Room()
        self._shares: dict[str, Share] = {}
        self._links: Counter[str] = Counter()
        self._running = 0
        self._entered = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        return self._running

    @property
    def entered(self) -> int:
        """How many there have been since the start, those in flight included."""
        return self._entered

    def share(self, gateway_id: str) -> Share:
        return self._shares.get(gateway_id) or Share()

    @contextmanager
    def enter(self, relay: Relay | None, tokens: int = 0, *, movable: bool = False) -> Iterator[Entry]:
        """Counts a request from here to the end of the block. `tokens`: its uncached prompt, as far as known; one that
        has none needs no room. `movable`: it heeds its `turn`, and can be put aside.

        Raises:
            MeshError: INSTANCE_FULL, where gateways ask and this one's request came without a grant and finds no room.
        """
        number = (
            self.room.arrive(relay, tokens, movable=movable) if tokens or (relay is not None and relay.grant) else 0
        )
        gateway_id = relay.gateway_id if relay is not None else ""
        share = self._shares.setdefault(gateway_id, Share())
        share.running += 1
        if relay is not None:
            share.seen_seq = max(share.seen_seq, relay.seq)
        self._running += 1
        self._entered += 1
        self._idle.clear()
        try:
            yield Entry(self.room, number)
        finally:
            if number:
                self.room.ended(number)
            share.running -= 1
            self._running -= 1
            if not self._running:
                self._idle.set()
            self._forget(gateway_id)

    @contextmanager
    def linked(self, gateway_id: str) -> Iterator[None]:
        """While a gateway's Link stands, its highest `seq` is remembered, whether anything of it runs or not."""
        self._links[gateway_id] += 1
        try:
            yield
        finally:
            self._links[gateway_id] -= 1
            self._forget(gateway_id)

    def _forget(self, gateway_id: str) -> None:
        """Nothing of a gateway that has gone and left nothing running: each of its lives has a name of its own."""
        share = self._shares.get(gateway_id)
        if not self._links[gateway_id]:
            del self._links[gateway_id]
            if share is not None and not share.running:
                del self._shares[gateway_id]

    async def wait_idle(self, timeout_s: float) -> bool:
        """True once nothing is in flight, False when the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
