"""A prompt that is taken out of a real vLLM and put in again, by `in_turn`. Runs in the interpreter that has vLLM.

argv: model folder. The last line that it prints is what it saw, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Relay, TokenIds
from services.chassis.room import Turn
from services.llm.engine import Event
from services.llm.engines.vllm import VllmEngine
from services.llm.in_turn import in_turn
from services.llm.settings import LlmSettings, VllmOptions
from services.llm.tiny_model import CONTEXT
from tests.kit.mesh import until

BLOCK, CHUNK = 32, 16  # tokens of a KV block, and of a step: so few that the prefill takes a while
ANSWER = 48
PROMPT = CONTEXT - 4 * ANSWER
OVERTAKEN = (PROMPT // 16, PROMPT // 8)  # tokens of it that the engine holds then
PATIENCE_S = 60.0
DICE = random.Random(3)
STEPS: list[int] = []  # prompt tokens that each step computed, as the engine tells
LONG, SHORT = (DICE.choices(range(64, 800), k=tokens) for tokens in (PROMPT, 2 * BLOCK))


class Prompt:
    """One prompt, when it may be in the engine, and what the engine itself tells of it."""

    def __init__(self, engine: VllmEngine, ids: list[int], tokens: int, salt: str) -> None:
        self.engine, self.turn = engine, Turn(True)
        self.request = lm.CompleteRequest(token_ids=TokenIds(ids=ids), relay=Relay(cache_salt=salt.encode()))
        self.request.sampling.MergeFrom(lm.Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))
        self.told: dict[str, Any] = {"begun": 0, "found": [], "ids": [], "cached": []}

    async def begin(self) -> AsyncIterator[Event]:
        self.told["begun"] += 1
        async with aclosing(self.engine.complete(self.request)) as events:
            async for event in events:
                self.told["found"] += [event.prompt.cached] if event.prompt is not None else []
                yield event

    async def read(self) -> dict[str, Any]:
        """The answer's ids, and what is said of the cache by its first event and its last."""
        before, told = self.engine.load().steps, len(STEPS)
        async for event in in_turn(self.begin, self.turn, cached=0):
            self.told["ids"] += [token for delta in event.deltas for token in delta.token_ids]
            self.told["cached"] += [event.prompt.cached] if event.prompt is not None else []
            self.told["cached"] += [event.usage.cached_tokens] if event.usage is not None else []
        await idle(self.engine)
        computed = [tokens for tokens in STEPS[told:] if tokens]
        return self.told | {"steps": self.engine.load().steps - before, "computed": computed}

    async def overtaken(self, tokens: int) -> int:
        """Waits until so much of it is held, and takes it out. Returns how much it was."""
        await until(lambda: self.engine.load().resident_tokens >= tokens, PATIENCE_S)
        held = self.engine.load().resident_tokens
        self.turn.over()
        await idle(self.engine)
        return held


def load(engine: VllmEngine) -> list[int]:
    now = engine.load()
    return [now.running, now.waiting, now.queued_tokens, now.resident_tokens]


async def idle(engine: VllmEngine) -> None:
    await until(lambda: not any(load(engine)), PATIENCE_S)


async def play(engine: VllmEngine) -> dict[str, Any]:
    told = {"alone": await Prompt(engine, LONG, ANSWER, "alone").read()}

    prompt, held, shorts = Prompt(engine, LONG, ANSWER, "moved"), [], []
    reading = asyncio.create_task(prompt.read())
    for tokens in OVERTAKEN:
        held.append(await prompt.overtaken(tokens))
        shorts.append(await Prompt(engine, SHORT, 1, f"short {tokens}").read())
        assert not reading.done() and prompt.told["begun"] == len(held)
        prompt.turn.mine.set()
    moved = await reading
    moved["steps"] -= sum(short["steps"] for short in shorts)
    told["moved"] = moved | {"held": held, "shorts": [len(short["ids"]) for short in shorts]}

    for where in ("left aside", "left inside"):
        prompt = Prompt(engine, LONG, ANSWER, where)
        reading = asyncio.create_task(prompt.read())
        await prompt.overtaken(OVERTAKEN[0])
        if where == "left inside":
            prompt.turn.mine.set()
            await until(lambda: engine.load().resident_tokens >= OVERTAKEN[1], PATIENCE_S)
        before = engine.load().steps
        reading.cancel()
        await asyncio.wait({reading})
        prompt.turn.mine.set()
        await Prompt(engine, SHORT, 1, f"after {where}").read()
        steps = engine.load().steps - before
        told[where] = {"begun": prompt.told["begun"], "load": load(engine), "steps": steps}
    return told


async def main(folder: str) -> dict[str, Any]:
    options = VllmOptions(dtype="float32", engine_args={"block_size": BLOCK, "max_num_batched_tokens": CHUNK})
    settings = LlmSettings(engine="vllm", model="tiny", source=folder, max_running=8, vllm=options)
    engine = VllmEngine(settings, computed=STEPS.append)
    try:
        await engine.start(lambda line: None)
        return await play(engine)
    finally:
        await engine.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))), flush=True)
