"""`infermesh llm --engine scripted` with an engine that can be broken while it runs:
`python -P -m tests.kit.faulty_llm FILE llm …`, where FILE holds the faults as JSON and may be written at any time.

    {"fail": 0.3}            share of requests that end with `reason` before their first token
    {"reason": "engine_failed"}
    {"slow": 10}             everything takes so many times as long
    {"wedge": true}          no step is made any more; health and Link go on
    {"stall": "word"}        requests with this word in the prompt stop after 5 tokens, unless they are resumed ones
    {"block_s": 5}           the event loop stands still so long, once for each time that the file is written
    {"start_s": 5}           the model takes so long to load

FILE.calls grows by one byte with each request that reaches the engine.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import services.llm.app as llm
from infermesh.cli import main
from infermesh.errors import MeshError, Reason
from services.chassis.held_prefixes import HeldPrefixes
from services.llm.engine import Computed, EngineInfo, Event
from services.llm.engines.scripted import ScriptedEngine
from services.llm.engines.scripted_batch import Pace, Step
from services.llm.settings import LlmSettings

LOOK_S = 0.02
STALL_AFTER = 5


class FaultyEngine(ScriptedEngine):
    def __init__(self, settings: LlmSettings, held: HeldPrefixes, computed: Computed, path: Path) -> None:
        super().__init__(settings, held, computed)
        self._path = path
        self._calls = path.with_name(path.name + ".calls").open("ab", buffering=0)
        self._told: dict[str, Any] = {}
        self._written = 0
        self._draw = random.Random(1)
        self._pace = self._batch._pace
        plan: Callable[[], Step | None] = self._batch.plan
        self._batch.plan = lambda: None if self._told.get("wedge") else plan()  # type: ignore[method-assign]

    async def start(self, progress: Callable[[str], None]) -> EngineInfo:
        self._read()
        self._looking = asyncio.create_task(self._look())
        progress("told to take its time")
        await asyncio.sleep(self._told.get("start_s", 0))
        return await super().start(progress)

    async def chat(self, request: Any) -> AsyncIterator[Event]:
        async for event in self._faulty(super().chat(request), request):
            yield event

    async def complete(self, request: Any) -> AsyncIterator[Event]:
        async for event in self._faulty(super().complete(request), request):
            yield event

    async def _faulty(self, events: AsyncIterator[Event], request: Any) -> AsyncIterator[Event]:
        self._calls.write(b".")
        if self._draw.random() < self._told.get("fail", 0):
            raise MeshError(Reason(self._told.get("reason", "engine_failed")), "told to fail")
        word = self._told.get("stall", "")
        stalls = bool(word) and not request.relay.resume.token_ids and word in str(request)
        told = 0
        async for event in events:
            yield event
            told += 1
            if stalls and told >= STALL_AFTER:
                await asyncio.sleep(3600)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._read():
                time.sleep(self._told.get("block_s", 0))  # noqa: ASYNC251 - to hold the loop is the fault
                slow = self._told.get("slow", 1)
                pace = self._pace
                self._batch._pace = Pace(
                    pace.prefill_tps / slow,
                    pace.prefill_doubling_ctx,
                    pace.step_ms * slow,
                    pace.kv_us_per_ktoken * slow,
                )
                self._kick.set()

    def _read(self) -> bool:
        """Whether there is news."""
        written = self._path.stat().st_mtime_ns
        if written == self._written:
            return False
        self._written = written
        self._told = json.loads(self._path.read_text())
        return True


if __name__ == "__main__":
    file = Path(sys.argv[1])
    llm.build_engine = lambda settings, held, computed: FaultyEngine(settings, held, computed, file)
    sys.exit(main(sys.argv[2:]))
