"""What fits a model, what fits this instance, and what goes elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from services.llm.window import OutOfWindow, Window


def budget(window: Window, prompt: int, **sampling: Any) -> int:
    return window.budget(prompt, lm.Sampling(**sampling))


WHOLE = Window(1000)
PART = Window(1000, 200, 600)  # serves 200 to 600 of them


@pytest.mark.parametrize(
    ("window", "prompt", "sampling", "tokens"),
    [
        (WHOLE, 100, {}, 900),
        (WHOLE, 100, {"max_tokens": 50}, 50),
        (WHOLE, 100, {"max_tokens": 1 << 31}, 900),  # an upper bound, cut to what fits
        (WHOLE, 999, {"max_tokens": 50}, 1),
        (PART, 100, {}, 500),
        (PART, 10, {}, 590),  # how long it gets is not known yet
        (PART, 100, {"max_tokens": 100}, 100),
        (PART, 100, {"max_tokens": 500}, 500),
    ],
)
def test_the_answer_gets_what_was_asked_or_what_fits(
    window: Window, prompt: int, sampling: dict[str, Any], tokens: int
) -> None:
    assert budget(window, prompt, **sampling) == tokens


@pytest.mark.parametrize(("prompt", "sampling"), [(100, {"max_tokens": 99}), (100, {"max_tokens": 501}), (600, {})])
def test_what_is_not_of_this_range_goes_elsewhere_with_its_count(prompt: int, sampling: dict[str, Any]) -> None:
    with pytest.raises(OutOfWindow) as refused:
        budget(PART, prompt, **sampling)
    assert (refused.value.reason, refused.value.prompt_tokens) == (Reason.OUT_OF_RANGE, prompt)
    assert "200 to 600" in refused.value.message


@pytest.mark.parametrize(
    ("prompt", "sampling", "reason", "param"),
    [
        (1000, {}, Reason.CONTEXT_LENGTH_EXCEEDED, "messages"),
        (5000, {"max_tokens": 1}, Reason.CONTEXT_LENGTH_EXCEEDED, "messages"),
        (900, {"min_tokens": 101}, Reason.INVALID_ARGUMENT, "sampling.min_tokens"),
    ],
)
def test_what_fits_nowhere_is_refused(prompt: int, sampling: dict[str, Any], reason: Reason, param: str) -> None:
    with pytest.raises(MeshError) as refused:
        budget(WHOLE, prompt, **sampling)
    assert (refused.value.reason, refused.value.param) == (reason, param)
