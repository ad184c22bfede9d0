"""The operator's bans as they reach this gateway: from its own doors, from the other gateways, from its file."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import structlog

from registry.port import Registry, Snapshot
from services.gateway.routing.bans import Ban, Bans, decode, from_metadata
from services.gateway.upstream.carrier import Carrier

GATEWAY = "gateway"
END_S = 0.5
AGAIN_S = 1.0
Publish = Callable[[dict[str, str]], Awaitable[None]]
log = structlog.get_logger("bans")


class BanBoard:
    """`file` keeps them over a restart of the last gateway."""

    def __init__(self, carrier: Carrier, file: Path | None = None, unix: Callable[[], float] = time.time) -> None:
        """Raises ValueError: the file cannot be read. Bans that are lost unseen are worse than no start."""
        self._carrier = carrier
        self._file = file
        self._unix = unix
        self._bans = Bans()
        self.holding: dict[str, str] = {}  # instance -> who banned it and why
        self._publish: Publish | None = None
        if file is not None:
            self._bans.merge(_read(file), unix())
            self._apply()

    @property
    def metadata(self) -> dict[str, str]:
        """For this gateway's registration."""
        return self._bans.metadata()

    async def tell(self, publish: Publish, told: Mapping[str, str]) -> None:
        """From now on `publish` puts what changes into this gateway's registration, which says `told` so far: what was
        heard while it was under way is told at once."""
        self._publish = publish
        if self.metadata != told:
            await publish(self.metadata)

    async def run(self) -> None:
        """Bans end by themselves."""
        while True:
            await asyncio.sleep(END_S)
            self._apply()

    async def watch(self, registry: Registry) -> None:
        """Hears of the other gateways' for ever."""
        while True:
            try:
                async for snapshot in registry.watch((GATEWAY,)):
                    await self.hear(snapshot)
            except Exception as error:
                log.error("the watch of gateways broke; starting it again", error=str(error))
            await asyncio.sleep(AGAIN_S)

    async def hear(self, snapshot: Snapshot) -> None:
        """What the other gateways carry."""
        gateways = [entry.endpoint for entry in snapshot.entries if entry.endpoint.kind == GATEWAY]
        told = [ban for endpoint in gateways for ban in from_metadata(endpoint.extra)]
        if self._bans.merge(told, self._unix()):
            await self._changed()

    async def put(self, id: str, by: str, why: str, for_s: float | None, *, lifted: bool = False) -> None:
        """An operator's word, spoken to this gateway.

        Raises:
            MeshError: there are too many.
        """
        now = self._unix()
        self._bans.put(Ban(now, id, by, why, now + for_s if for_s is not None else 0.0, lifted))
        log.warning("ban lifted" if lifted else "instance banned", instance=id, by=by, why=why, for_s=for_s)
        await self._changed()

    async def _changed(self) -> None:
        self._apply()
        if self._file is not None:
            _write(self._file, list(self._bans.known.values()))
        if self._publish is not None:
            await self._publish(self.metadata)

    def _apply(self) -> None:
        holding = self._bans.holding(self._unix())
        if holding != self.holding:
            self.holding = holding
            carrier = self._carrier
            carrier.do(carrier.router.ban(holding, carrier.now()))
            carrier.touch()


def _read(file: Path) -> list[Ban]:
    try:
        lines = json.loads(file.read_text()) if file.exists() else []
        found = [decode(json.dumps(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"bans_file: {file}: {error}") from None
    return [ban for ban in found if ban is not None]


def _write(file: Path, bans: list[Ban]) -> None:
    """Whole or not at all; a few kilobytes at an operator's word."""
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps([asdict(ban) for ban in bans]))
        os.replace(partial, file)
    except OSError as error:
        log.error("bans do not outlive this process; --bans-file names a place", file=str(file), error=str(error))
