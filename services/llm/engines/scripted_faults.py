"""Faults that a test switches on and off while the scripted engine runs: a JSON file that it looks at (`--fault-file`).

    halt          true: no step is made, while health, Link and everything else go on (a wedged engine)
    block_s       holds the whole event loop for so many seconds, once for each time the file is written with it
    slow          factor on every step, 10 = ten times slower
    fail_ratio    0 … 1: the share of requests that fail before their first token, evenly spread
    fail_with     their reason, a word of docs/errors.md; engine_failed unless told
    stall_next    so many of the next requests go silent for good after `stall_after` tokens, while others flow
    stall_after   tokens, 3 unless told

A file that is not there, or empty, is no fault. One that cannot be read ends the process: a test must not pass by it.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from infermesh.errors import MeshError, Reason

LOOK_S = 0.02


class Switches(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    halt: bool = False
    block_s: float = Field(default=0, ge=0, le=60)
    slow: float = Field(default=1, gt=0, le=1000)
    fail_ratio: float = Field(default=0, ge=0, le=1)
    fail_with: Reason = Reason.ENGINE_FAILED
    stall_next: int = Field(default=0, ge=0)
    stall_after: int = Field(default=3, ge=0)


class Faults:
    """What is switched on now. Without a file nothing ever is, and nothing is looked at."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._seen = b""
        self._owed = 0.0  # of failures, to the next whole one
        self._stalls = 0
        self.on = Switches()

    async def watch(self) -> None:
        """Follows the file for ever.

        Raises:
            ValueError: it holds something else.
        """
        while self._file is not None:
            said = self._file.read_bytes() if self._file.exists() else b""
            if said != self._seen:
                self._seen = said
                self.on = Switches(**json.loads(said or b"{}"))
                self._stalls = self.on.stall_next
                if self.on.block_s:
                    time.sleep(self.on.block_s)  # noqa: ASYNC251 - holding the loop is what it is for
            await asyncio.sleep(LOOK_S)

    def enter(self) -> int | None:
        """A request begins. After how many tokens it goes silent, None = never.

        Raises:
            MeshError: it is one of those that fail.
        """
        self._owed += self.on.fail_ratio
        if self._owed > 1 - 1e-9:
            self._owed -= 1
            raise MeshError(self.on.fail_with, "the scripted engine was told to fail")
        if not self._stalls:
            return None
        self._stalls -= 1
        return self.on.stall_after

    async def step(self, seconds: float) -> float:
        """Before a step: waits while the engine is halted. Returns how long the step lasts."""
        while self.on.halt:  # noqa: ASYNC110 - the file is polled anyway
            await asyncio.sleep(LOOK_S)
        return seconds * self.on.slow
