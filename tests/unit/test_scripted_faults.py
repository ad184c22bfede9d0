"""Faults of the scripted engine that tests switch on while it runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from services.llm.engines.scripted import ScriptedEngine
from services.llm.settings import LlmSettings, ScriptedOptions
from tests.kit.mesh import until

SPEED = {"step_ms": 1}


@asynccontextmanager
async def engine(file: Path) -> AsyncIterator[ScriptedEngine]:
    made = ScriptedEngine(
        LlmSettings(engine="scripted", model="m", speed=SPEED, scripted=ScriptedOptions(fault_file=file))  # type: ignore[arg-type]
    )
    await made.start(lambda line: None)
    try:
        yield made
    finally:
        await made.close()


async def switch(made: ScriptedEngine, file: Path, **faults: Any) -> None:
    said = _write(file, faults)
    await until(lambda: made._faults._seen == said, 5)


def _write(file: Path, faults: dict[str, Any]) -> bytes:
    said = json.dumps(faults).encode()
    file.write_bytes(said)
    return said


async def tokens(made: ScriptedEngine, count: int = 10) -> int:
    request = lm.CompleteRequest(model="m", text="one two", sampling=lm.Sampling(max_tokens=count))
    return sum([len(event.deltas[0].token_ids) async for event in made.complete(request)])


async def test_halted_it_makes_no_step_and_goes_on_when_the_fault_is_over(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    async with engine(file) as made:
        assert await tokens(made) == 10
        await switch(made, file, halt=True)
        call = asyncio.create_task(tokens(made))
        await until(lambda: made.load().waiting or made.load().running, 5)
        steps = made.load().steps
        await asyncio.sleep(0.1)
        assert not call.done() and made.load().steps == steps
        await switch(made, file)
        assert await asyncio.wait_for(call, 5) == 10


async def test_one_stream_stalls_while_others_flow(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    async with engine(file) as made:
        await switch(made, file, stall_next=1)
        first = asyncio.create_task(tokens(made))
        await asyncio.sleep(0)
        assert await tokens(made) == 10
        await asyncio.sleep(0.05)
        assert not first.done()
        first.cancel()


async def test_a_share_of_requests_fails(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    async with engine(file) as made:
        await switch(made, file, fail_ratio=0.3, fail_with="internal")
        ends = await asyncio.gather(*(tokens(made, 1) for _ in range(10)), return_exceptions=True)
        failed = [end for end in ends if isinstance(end, MeshError)]
        assert len(failed) == 3 and {error.reason for error in failed} == {Reason.INTERNAL}


async def test_a_file_that_is_not_understood_ends_the_engine(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    file.write_text('{"hault": true}')
    async with engine(file) as made:
        assert "hault" in await asyncio.wait_for(made.died(), 5)


@pytest.mark.parametrize("file", [None, Path("/nonexistent/faults.json")])
async def test_no_file_is_no_fault(file: Path | None) -> None:
    async with engine(file) as made:  # type: ignore[arg-type]
        assert await tokens(made) == 10
