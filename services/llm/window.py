"""How much text a request may have here: the model's context and the part of it that this instance serves. Pure.

Engines ask `Window.budget` once they have counted the prompt and before they compute anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import language_model_pb2 as lm
from services.chassis.checks import too_long

PROMPT_TOKENS_KEY = "x-infermesh-prompt-tokens"


class OutOfWindow(MeshError):
    """OUT_OF_RANGE with the exact count, so that the gateway corrects its estimate and picks again."""

    def __init__(self, message: str, prompt_tokens: int) -> None:
        super().__init__(Reason.OUT_OF_RANGE, message)
        self.prompt_tokens = prompt_tokens


@dataclass(frozen=True, slots=True)
class Window:
    """`model` tokens of prompt and answer together fit the model; `low..high` of them are served by this instance."""

    model: int
    low: int = 0
    high: int = 0  # 0 = as the model

    @property
    def top(self) -> int:
        """The most that is served here."""
        return min(self.model, self.high or self.model)

    def budget(self, prompt_tokens: int, sampling: lm.Sampling) -> int:
        """The most tokens the answer may have. `max_tokens` above the room is cut to it: it is an upper bound, and the
        answer then ends with FINISH_LENGTH.

        Raises:
            MeshError: CONTEXT_LENGTH_EXCEEDED when the prompt fits nowhere; OUT_OF_RANGE when it fits elsewhere;
                INVALID_ARGUMENT when `min_tokens` cannot be reached.
        """
        room = self.model - prompt_tokens
        if room < 1:
            raise too_long(prompt_tokens, self.model)
        wanted = min(sampling.max_tokens, room) if sampling.HasField("max_tokens") else None
        total = prompt_tokens + (wanted or 1)
        if total > self.top or (wanted is not None and total < self.low):
            raise OutOfWindow(
                f"the prompt has {prompt_tokens} tokens and the answer may have {wanted or 'any number'}; "
                f"this instance serves {self.low} to {self.top} together",
                prompt_tokens,
            )
        budget = wanted or self.top - prompt_tokens
        if sampling.min_tokens > budget:
            raise invalid("sampling.min_tokens", f"{sampling.min_tokens} is above the {budget} tokens that fit")
        return budget
