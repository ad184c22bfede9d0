"""Events of completions as OpenAI's chunks, or collected into one reply. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm
from services.gateway.front.reply_parts import (
    TextLogprobs,
    add_usage,
    finish_reason,
    prompt_logprobs,
    stop_reason,
    usage_json,
)


@dataclass(frozen=True, slots=True)
class CompletionOptions:
    """`logprobs` None: none. `prompts` are the texts to account for in an echo, empty where token ids were sent."""

    n: int = 1
    include_usage: bool = False
    logprobs: int | None = None
    token_ids: bool = False
    echo: bool = False
    prompts: tuple[str, ...] = ()


class _Choices:
    """What streams and whole replies share: numbering, logprobs with their offsets, the sum of the usage.

    Choice `n * prompt + choice` belongs to that prompt.
    """

    def __init__(self, options: CompletionOptions) -> None:
        self.options = options
        self.started: dict[int, lm.Started] = {}
        self.usage = inf.Usage()
        self._logprobs: dict[int, TextLogprobs] = {}

    def note(self, prompt: int, message: lm.CompleteResponse) -> None:
        if message.HasField("started"):
            self.started[prompt] = message.started
        if message.HasField("usage"):
            add_usage(self.usage, message.usage)

    def logprobs(self, prompt: int, index: int) -> TextLogprobs | None:
        options = self.options
        if options.logprobs is None:
            return None
        found = self._logprobs.get(index)
        if found is None:
            found = self._logprobs[index] = TextLogprobs(options.logprobs)
            if options.echo and prompt in self.started:
                found.add_prompt(self.started[prompt], options.prompts[prompt])
        return found

    def head(self, model: str, fallback_id: str) -> dict[str, Any]:
        started = next(iter(self.started.values()), lm.Started())
        return {
            "id": started.id or fallback_id,
            "object": "text_completion",
            "created": started.created,
            "model": started.model or model,
        }


class CompletionChunks(_Choices):
    """One stream. The parts of a chunk that never change are rendered once."""

    def __init__(self, options: CompletionOptions) -> None:
        super().__init__(options)
        self._plain = options.logprobs is None and not options.token_ids and options.n == 1
        self._head = b""

    def begin(self, prompt: int, message: lm.CompleteResponse, model: str, fallback_id: str) -> None:
        """Call it with the very first message, before `render` has it too."""
        self.started[prompt] = message.started
        self._head = b"data: " + orjson.dumps(self.head(model, fallback_id))[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self.options.include_usage else b"]}\n\n"

    def render(self, prompt: int, message: lm.CompleteResponse) -> bytes:
        """Raises MeshError: ENGINE_FAILED."""
        self.note(prompt, message)
        deltas = message.deltas
        if self._plain and len(deltas) == 1 and not deltas[0].finish:
            text = deltas[0].content
            if not text:
                return b""
            body = b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}' % (prompt, orjson.dumps(text))
            return self._head + body + self._tail
        return b"".join([self._chunk(prompt, delta) for delta in deltas])

    def last(self) -> bytes:
        if not self.options.include_usage:
            return b""
        return self._head + b'],"usage":' + orjson.dumps(usage_json(self.usage)) + b"}\n\n"

    def _chunk(self, prompt: int, delta: lm.Delta) -> bytes:
        index = prompt * self.options.n + delta.choice
        finish = finish_reason(delta.finish)
        choice: dict[str, Any] = {"index": index, "text": delta.content, "logprobs": None, "finish_reason": finish}
        logprobs = self.logprobs(prompt, index)
        if logprobs is not None:
            logprobs.add(delta.logprobs)
            if logprobs.tokens:
                choice["logprobs"] = logprobs.json()
        if self.options.token_ids:
            choice["token_ids"] = list(delta.token_ids)
        if finish is not None and (stopped := stop_reason(delta)) is not None:
            choice["stop_reason"] = stopped
        told = delta.content or finish or choice["logprobs"] or choice.get("token_ids")
        made = self._head + orjson.dumps(choice) + self._tail if told else b""
        if logprobs is not None:
            logprobs.clear()
        return made


class CompletionCollected(_Choices):
    """All events of a request that is answered at once."""

    def __init__(self, options: CompletionOptions) -> None:
        super().__init__(options)
        self._text: dict[int, list[str]] = {}
        self._ids: dict[int, list[int]] = {}
        self._ends: dict[int, tuple[str | None, str | int | None]] = {}

    def add(self, prompt: int, message: lm.CompleteResponse) -> None:
        """Raises MeshError: ENGINE_FAILED."""
        self.note(prompt, message)
        for delta in message.deltas:
            index = prompt * self.options.n + delta.choice
            text = self._text.setdefault(index, [])
            if delta.content:
                text.append(delta.content)
            if self.options.token_ids:
                self._ids.setdefault(index, []).extend(delta.token_ids)
            logprobs = self.logprobs(prompt, index)
            if logprobs is not None:
                logprobs.add(delta.logprobs)
            if delta.finish:
                self._ends[index] = (finish_reason(delta.finish), stop_reason(delta))

    def reply(self, model: str, fallback_id: str) -> dict[str, Any]:
        return {
            **self.head(model, fallback_id),
            "choices": [self._choice(index) for index in sorted(self._text)],
            "usage": usage_json(self.usage),
        }

    def _choice(self, index: int) -> dict[str, Any]:
        finish, stopped = self._ends.get(index, (None, None))
        made: dict[str, Any] = {
            "index": index,
            "text": "".join(self._text[index]),
            "logprobs": None,
            "finish_reason": finish,
        }
        logprobs = self.logprobs(index // self.options.n, index)
        if logprobs is not None:
            made["logprobs"] = logprobs.json()
        if self.options.token_ids:
            made["token_ids"] = self._ids.get(index, [])
        if stopped is not None:
            made["stop_reason"] = stopped
        started = self.started.get(index // self.options.n)
        if started is not None and started.prompt_logprobs and not self.options.echo:
            made["prompt_logprobs"] = prompt_logprobs(started)
        return made
