"""A prompt taken out of a real vLLM in the middle of its prefill loses nothing by it, and leaves nothing there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.llm import llm_python
from tests.kit.vllm_in_turn import ANSWER, BLOCK, CHUNK, OVERTAKEN, PROMPT

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]


def test_an_overtaken_prompt_goes_on_where_it_was(tiny_model: Path) -> None:
    told = json.loads(llm_python("-m", "tests.kit.vllm_in_turn", str(tiny_model), timeout_s=280).splitlines()[-1])
    alone, moved = told["alone"], told["moved"]
    print(f"held {moved['held']}, found {moved['found']}, {alone['steps']} steps alone, {moved['steps']} moved")
    assert alone["found"] == [0] and len(set(alone["ids"])) > ANSWER // 3, "one that repeats itself would prove nothing"
    assert sum(alone["computed"]) == PROMPT and max(alone["computed"]) == CHUNK, "each step tells what it computed"
    assert moved["begun"] == len(OVERTAKEN) + 1 and moved["shorts"] == [1] * len(OVERTAKEN)
    assert moved["ids"] == alone["ids"] and len(moved["ids"]) == ANSWER
    (found,) = moved["found"]
    assert PROMPT > found >= moved["held"][-1] - CHUNK - BLOCK > 0, "what was computed is in the cache"
    assert moved["steps"] < alone["steps"] + OVERTAKEN[0] // CHUNK, "nothing of consequence is computed twice"
    assert moved["cached"] == [0, 0], "the caller's own first attempt is not what the caller calls cached"
    for where, begun in (("left aside", 1), ("left inside", 2)):
        left = told[where]
        assert (left["begun"], left["load"]) == (begun, [0, 0, 0, 0])
        assert left["steps"] < PROMPT // CHUNK // 2, "nobody waits for it, so it is not computed"
