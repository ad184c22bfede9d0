"""vLLM's RequestOutputs, one an engine step -> events."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Usage
from services.llm.engine import Event, PromptFacts
from services.llm.engines.vllm_render import Prompt
from services.llm.engines.vllm_replay import Voice, mend

_FINISH = {"stop": lm.FINISH_STOP, "length": lm.FINISH_LENGTH, "abort": lm.FINISH_ABORT}
_HEX_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Answer:
    """Reads one request's outputs; it holds the parsers' state of every choice."""

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: Any,
        *,
        choices: int,
        top: int | None,
        prompt_top: int | None = None,
        echo: str = "",
        parallel_tools: bool = True,
        forced_function: bool = False,
        voice: Voice | None = None,
    ) -> None:
        """`voice`: what the one choice's text is taken from instead of the outputs; a replay needs it, and so do
        parsers, whose state must not depend on how many tokens an output holds.
        `top`, `prompt_top`: alternatives a token, None = no logprobs; `forced_function`: the tool call was named by
        the caller, which by OpenAI's rules ends with `stop`."""
        self._prompt = prompt
        self._tokenizer = tokenizer
        space = tokenizer.convert_tokens_to_ids("\u0120") if top is not None or prompt_top is not None else None
        self._byte_level = space is not None and space != tokenizer.unk_token_id
        self._top = top
        self._prompt_top = prompt_top
        self._parsers = [prompt.make_parser() for _ in range(choices)] if prompt.make_parser else []
        self._parallel_tools = parallel_tools
        self._forced_function = forced_function
        self._echo = [echo] * choices
        self._strip = [prompt.strip_space] * choices
        self._called = [False] * choices
        self._ids: list[list[int]] = [[] for _ in range(choices)]  # for the parsers' count of reasoning tokens
        self._completion_tokens = 0
        self._cached: int | None = None
        self._first = True
        self._voice = voice
        self._replayed: Sequence[int] = ()
        self._ending: lm.Delta | None = None  # what ended it, where that was in the replay

    def replay(self, token_ids: Sequence[int]) -> None:
        """Says what another instance has delivered, with output off; more of it may follow."""
        assert self._voice is not None
        if self._ending is not None:
            return
        unheard = lm.Delta()
        for spoken in self._voice.say(token_ids):
            self._speak(unheard, 0, spoken)
        self._replayed = token_ids
        self._echo = [""]
        if unheard.finish:
            self._ending = lm.Delta(finish=unheard.finish)
            if unheard.WhichOneof("stop") is not None:
                self._ending.stop_text = unheard.stop_text

    @property
    def over(self) -> bool:
        return self._ending is not None

    def rest(self) -> Event:
        """The end of an answer of which nothing is left to be computed."""
        delta = self._ending or lm.Delta()
        if self._ending is None and self._voice is not None:
            for spoken in self._voice.say((), "length"):
                self._speak(delta, 0, spoken)
        return Event([delta], self._prompt_facts(), self._usage())

    def event(self, output: Any) -> Event | None:
        """What one output tells; None while it tells nothing (a prompt still being computed)."""
        deltas = [delta for choice in output.outputs if (delta := self._delta(choice)) is not None]
        if self._cached is None:  # the other choices find what the first one has computed
            self._cached = output.num_cached_tokens
        if not deltas and not output.finished:
            return None
        event = Event(deltas)
        if self._first:
            self._first = False
            event.prompt = self._prompt_facts(output.prompt_logprobs)
        if output.finished or (self._voice is not None and deltas[0].finish):
            event.usage = self._usage()
        return event

    def _prompt_facts(self, logprobs: Sequence[Mapping[int, Any] | None] | None = None) -> PromptFacts:
        return PromptFacts(len(self._prompt.ids), self._cached_tokens, tuple(self._prompt_logprobs(logprobs)))

    def _usage(self) -> Usage:
        """Of the whole answer, what was replayed among it."""
        return Usage(
            prompt_tokens=len(self._prompt.ids),
            completion_tokens=self._completion_tokens,
            cached_tokens=self._cached_tokens,
            reasoning_tokens=sum(
                parser.count_reasoning_tokens(tuple(ids)) for parser, ids in zip(self._parsers, self._ids, strict=False)
            ),
        )

    @property
    def _cached_tokens(self) -> int:
        """Of the prompt; the engine may have found delivered tokens, too."""
        return min(self._cached or 0, len(self._prompt.ids))

    def _delta(self, choice: Any) -> lm.Delta | None:
        if choice.finish_reason == "error":
            raise MeshError(Reason.ENGINE_FAILED, "the engine failed at this request; its log tells why")
        index, ids = choice.index, list(choice.token_ids)
        if not ids and not choice.text and choice.finish_reason is None:
            return None
        delta = lm.Delta(choice=index)
        if self._voice is None:
            self._speak(delta, index, choice)
        else:
            for spoken in self._voice.say(ids, choice.finish_reason, choice.stop_reason):
                self._speak(delta, index, spoken)
        if self._top is not None and choice.logprobs:
            if self._replayed:
                mend(choice.logprobs, self._replayed, self._tokenizer)
                self._replayed = ()
            for token, candidates in zip(delta.token_ids, choice.logprobs, strict=False):
                delta.logprobs.append(self._logprob(token, candidates, self._top))
        return delta

    def _speak(self, delta: lm.Delta, index: int, spoken: Any) -> None:
        """Adds an output of the engine, or one token of it, to what is sent."""
        delta.token_ids.extend(spoken.token_ids)
        self._completion_tokens += len(spoken.token_ids)
        self._text(delta, index, spoken)
        if self._echo[index]:
            delta.content = self._echo[index] + delta.content
            self._echo[index] = ""
        if spoken.finish_reason is not None:
            self._finish(delta, index, spoken)

    def _text(self, delta: lm.Delta, index: int, spoken: Any) -> None:
        text = spoken.text
        if self._strip[index] and text:
            self._strip[index] = False
            text = text.removeprefix(" ")
        if not self._parsers:
            delta.content += text
            return
        self._ids[index].extend(spoken.token_ids)
        parsed = self._parsers[index].parse_delta(
            text,
            list(spoken.token_ids),
            self._prompt.request,
            prompt_token_ids=self._prompt.ids,
            finished=spoken.finish_reason is not None,
        )
        if parsed is None:
            return
        delta.content += parsed.content or ""
        delta.reasoning += parsed.reasoning or ""
        for call in parsed.tool_calls or ():
            if call.index > 0 and not self._parallel_tools:
                continue
            function = call.function
            delta.tool_calls.add(
                index=call.index,
                id=call.id or "",
                name=(function.name if function else "") or "",
                arguments_json=(function.arguments if function else "") or "",
            )
            self._called[index] = True

    def _finish(self, delta: lm.Delta, index: int, spoken: Any) -> None:
        delta.finish = _FINISH.get(spoken.finish_reason, lm.FINISH_STOP)
        if delta.finish == lm.FINISH_STOP and self._called[index] and not self._forced_function:
            delta.finish = lm.FINISH_TOOL_CALLS
        if isinstance(spoken.stop_reason, str):
            delta.stop_text = spoken.stop_reason
        elif isinstance(spoken.stop_reason, int):
            delta.stop_token = spoken.stop_reason

    def _prompt_logprobs(self, positions: Sequence[Mapping[int, Any] | None] | None) -> list[lm.PositionLogprobs]:
        if self._prompt_top is None or not positions:
            return []
        found = []
        for token, candidates in zip(self._prompt.ids[1:], list(positions)[1:], strict=False):
            line = self._logprob(token, candidates or {}, self._prompt_top)
            own = lm.TopLogprob(
                token_id=token,
                token=line.token,
                token_bytes=line.token_bytes,
                logprob=line.logprob,
                rank=_rank(candidates, token),
            )
            found.append(lm.PositionLogprobs(candidates=[own, *(top for top in line.top if top.token_id != token)]))
        return found

    def _logprob(self, token: int, candidates: Mapping[int, Any], top: int) -> lm.TokenLogprob:
        ranked = sorted(candidates.items(), key=lambda item: item[1].rank or 1 << 30)[:top]
        own = candidates.get(token)
        text = (own.decoded_token if own else None) or ""
        line = lm.TokenLogprob(
            token_id=token,
            token=text,
            token_bytes=self._bytes(token, text),
            logprob=own.logprob if own else 0.0,
        )
        for id, candidate in ranked:
            text = candidate.decoded_token or ""
            line.top.add(
                token_id=id,
                token=text,
                token_bytes=self._bytes(id, text),
                logprob=candidate.logprob,
                rank=candidate.rank or 0,
            )
        return line

    def _bytes(self, token: int, text: str) -> bytes:
        return token_bytes(self._tokenizer.convert_ids_to_tokens(token), text, byte_level=self._byte_level)


def token_bytes(piece: str | None, text: str, *, byte_level: bool) -> bytes:
    """The bytes of one token, also of one that is part of a character, from `piece`, its name in the vocabulary (None:
    the model's head is padded beyond the tokenizer's, and what stands there can be drawn).
    `text` is how it reads, which for the last part of a character is the whole of it.
    """
    if piece is None:
        return text.encode()
    if match := _HEX_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if not byte_level:
        return text.encode()
    try:
        return bytes(_BYTE_OF[char] for char in piece)
    except KeyError:  # an added token, which is plain text
        return text.encode()


def _byte_of() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and the rest as the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(rest)}


_BYTE_OF = _byte_of()


def _rank(candidates: Mapping[int, Any] | None, token: int) -> int:
    own = (candidates or {}).get(token)
    return (own.rank or 0) if own else 0
