"""An answer's text from its token ids, one at a time, and the part of it that another instance has delivered.

vLLM itself detokenizes and matches stop strings from the prompt on, in steps that depend on how fast its outputs are
read. Here the state after token k is a function of (request, ids[:k]) alone, which is what lets another instance replay
it: the same detokenizer and stop matcher, fed token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor

from infermesh.errors import invalid
from infermesh.v1 import language_model_pb2 as lm

CONTEXT_TOKENS = 4  # as many tokens as one character of UTF-8 may be spread over


@dataclass(frozen=True, slots=True)
class Spoken:
    """One token and the text that it sets free; named as in vLLM's CompletionOutput."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Voice:
    """vLLM's own detokenizer and stop matcher over one choice."""

    def __init__(self, tokenizer: Any, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        request = SimpleNamespace(
            request_id="", sampling_params=params, prompt_token_ids=list(prompt_ids), prompt_embeds=None
        )
        self._detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)

    def say(
        self, token_ids: Sequence[int], finish: str | None = None, stop: int | str | None = None
    ) -> Iterator[Spoken]:
        """`finish`, `stop`: how the engine says that the answer ends with the last of these. A stop string ends it at
        the token that completes it, whatever the engine has made since.
        """
        last = len(token_ids) - 1
        for at, token in enumerate(token_ids):
            ending, cause = (finish, stop) if at == last else (None, None)
            by_token = ending == "stop" and not isinstance(cause, str)
            found = self._detokenizer.update([token], by_token)
            if found is not None:
                ending, cause = "stop", found
            yield Spoken((token,), self._text(ending), ending, cause)
            if found is not None:
                return
        if last < 0 and finish is not None:
            yield Spoken((), self._text(finish), finish, stop)

    def _text(self, ending: str | None) -> str:
        return str(self._detokenizer.get_next_output_text(ending is not None, True))


def remaining(sampling: lm.Sampling, done: int, budget: int) -> tuple[lm.Sampling, int]:
    """What the engine is to sample after `done` tokens, of `budget` in all. It matches no stop strings: those that span
    the seam are seen by the voice alone.

    Raises:
        MeshError: INVALID_ARGUMENT, more was delivered than the answer may have.
    """
    if done > budget:
        raise invalid("relay.resume.token_ids", f"{done} tokens of an answer that may have {budget}")
    rest = lm.Sampling()
    rest.CopyFrom(sampling)
    rest.ClearField("stop")
    if rest.min_tokens:
        rest.min_tokens = max(0, rest.min_tokens - done)
    return rest, budget - done


def mend(logprobs: Sequence[dict[int, Any]], done: Sequence[int], tokenizer: Any) -> None:
    """Names the parts of a character that began before the seam as an engine that saw its beginning would have:
    vLLM reads them together with the sampled tokens before them, of which a resumed request has none."""
    context = list(done[-CONTEXT_TOKENS:])
    reader = LogprobsProcessor(tokenizer, None, None, None, None, None)
    for candidates in logprobs[:CONTEXT_TOKENS]:
        ids = list(candidates)
        names = reader._verify_tokens(convert_ids_list_to_tokens(tokenizer, ids), ids, context)
        for token, name in zip(ids, names, strict=True):
            if not candidates[token].decoded_token:  # part of a character, as far as the engine could see
                candidates[token].decoded_token = name
        context = [*context, ids[0]][-CONTEXT_TOKENS:]
