"""The pieces that chat and completion replies have in common: usage, finish reasons, logprobs. Pure."""

from __future__ import annotations

from typing import Any

from infermesh.errors import MeshError, Reason
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm

LOWEST = -9999.0  # JSON has no -Infinity
FINISH: dict[int, str] = {
    lm.FINISH_STOP: "stop",
    lm.FINISH_LENGTH: "length",
    lm.FINISH_TOOL_CALLS: "tool_calls",
}


def finish_reason(finish: int) -> str | None:
    """Raises MeshError: ENGINE_FAILED, when the engine gave the request up."""
    if finish == lm.FINISH_ABORT:
        raise MeshError(Reason.ENGINE_FAILED, "the engine gave the request up")
    return FINISH.get(finish)


def stop_reason(delta: lm.Delta) -> str | int | None:
    """The stop string or token that ended a choice, as vLLM reports it."""
    which = delta.WhichOneof("stop")
    return getattr(delta, which) if which else None


def usage_json(usage: inf.Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def add_usage(total: inf.Usage, one: inf.Usage) -> None:
    total.prompt_tokens += one.prompt_tokens
    total.completion_tokens += one.completion_tokens
    total.cached_tokens += one.cached_tokens
    total.reasoning_tokens += one.reasoning_tokens


def chat_logprobs(entries: Any, top: int) -> list[dict[str, Any]]:
    """`choices[].logprobs.content` of a chat reply."""
    return [
        {**_candidate(entry), "top_logprobs": [_candidate(other) for other in entry.top[:top]]} for entry in entries
    ]


def _candidate(entry: Any) -> dict[str, Any]:
    return {"token": entry.token, "logprob": max(entry.logprob, LOWEST), "bytes": list(entry.token_bytes)}


def prompt_logprobs(started: lm.Started) -> list[dict[str, Any] | None]:
    """vLLM's shape: a map of token id to logprob for every prompt token, none for the first."""
    return [None, *(_position(position) for position in started.prompt_logprobs)]


def _position(position: lm.PositionLogprobs) -> dict[str, Any]:
    return {
        str(one.token_id): {"logprob": max(one.logprob, LOWEST), "rank": one.rank, "decoded_token": one.token}
        for one in position.candidates
    }


class TextLogprobs:
    """`choices[].logprobs` of a completion, with offsets into the text so far."""

    __slots__ = ("offset", "offsets", "tokens", "top", "top_logprobs", "values")

    def __init__(self, top: int, offset: int = 0) -> None:
        self.top = top
        self.offset = offset
        self.clear()

    def clear(self) -> None:
        self.tokens: list[str] = []
        self.values: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.offsets: list[int] = []

    def add(self, entries: Any) -> None:
        for entry in entries:
            self._one(entry.token, max(entry.logprob, LOWEST), entry.top[: self.top])

    def add_prompt(self, started: lm.Started, prompt: str) -> None:
        """An echoed prompt. The first token has no probability, and its text is what the others leave over."""
        rest = [position.candidates[0] for position in started.prompt_logprobs if position.candidates]
        tail = "".join(one.token for one in rest)
        first = prompt[: len(prompt) - len(tail)] if tail and prompt.endswith(tail) else "" if rest else prompt
        self._one(first, None, ())
        for position in started.prompt_logprobs:
            if position.candidates:
                one = position.candidates[0]
                self._one(one.token, max(one.logprob, LOWEST), position.candidates[: self.top])

    def _one(self, token: str, value: float | None, top: Any) -> None:
        self.tokens.append(token)
        self.values.append(value)
        self.top_logprobs.append({one.token: max(one.logprob, LOWEST) for one in top} if value is not None else None)
        self.offsets.append(self.offset)
        self.offset += len(token)

    def json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.values,
            "top_logprobs": self.top_logprobs if self.top else None,
            "text_offset": self.offsets,
        }
