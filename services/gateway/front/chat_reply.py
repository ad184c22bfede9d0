"""Events of a chat as OpenAI's chunks, or collected into one reply. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm
from services.gateway.front.reply_parts import (
    chat_logprobs,
    finish_reason,
    prompt_logprobs,
    stop_reason,
    usage_json,
)

_CONTENT = b'{"index":0,"delta":{"content":'
_PLAIN = b'},"logprobs":null,"finish_reason":null}'


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the reply shall contain. `top_logprobs` None: no logprobs."""

    include_usage: bool = False
    top_logprobs: int | None = None
    token_ids: bool = False
    reasoning: bool = True


class ChatChunks:
    """One stream. The parts of a chunk that never change are rendered once."""

    def __init__(self, options: ChatOptions, started: lm.Started, model: str, fallback_id: str) -> None:
        self._options = options
        self._general = options.top_logprobs is not None or options.token_ids
        self._seen: set[int] = set()
        self._usage: inf.Usage | None = None
        head = {
            "id": started.id or fallback_id,
            "object": "chat.completion.chunk",
            "created": started.created,
            "model": started.model or model,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"
        self._before = self._head + _CONTENT
        self._after = _PLAIN + self._tail

    def render(self, message: lm.ChatResponse) -> bytes:
        """The chunks of one event; empty when there is nothing to tell yet.

        Raises:
            MeshError: ENGINE_FAILED.
        """
        deltas = message.deltas
        if len(deltas) == 1 and not self._general and 0 in self._seen:
            delta = deltas[0]
            if not (delta.choice or delta.finish or delta.reasoning or delta.tool_calls):
                content = delta.content
                if not content:
                    return b""
                return self._before + orjson.dumps(content) + self._after
        return b"".join([self._chunk(choice) for delta in deltas for choice in self._choices(delta)])

    def last(self, usage: inf.Usage | None) -> bytes:
        if not self._options.include_usage:
            return b""
        return self._head + b'],"usage":' + orjson.dumps(usage_json(usage or inf.Usage())) + b"}\n\n"

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return self._head + orjson.dumps(choice) + self._tail

    def _choices(self, delta: lm.Delta) -> list[dict[str, Any]]:
        made = []
        index = delta.choice
        if index not in self._seen:
            self._seen.add(index)
            role = {"role": "assistant", "content": ""}
            made.append({"index": index, "delta": role, "logprobs": None, "finish_reason": None})
        change: dict[str, Any] = {}
        if delta.reasoning and self._options.reasoning:
            change["reasoning_content"] = delta.reasoning
        if delta.content:
            change["content"] = delta.content
        if delta.tool_calls:
            change["tool_calls"] = [_call_delta(call) for call in delta.tool_calls]
        finish = finish_reason(delta.finish)
        choice = {"index": index, "delta": change, "logprobs": None, "finish_reason": finish}
        if self._options.top_logprobs is not None and delta.logprobs:
            choice["logprobs"] = {"content": chat_logprobs(delta.logprobs, self._options.top_logprobs), "refusal": None}
        if self._options.token_ids:
            choice["token_ids"] = list(delta.token_ids)
        if finish is not None and (stopped := stop_reason(delta)) is not None:
            choice["stop_reason"] = stopped
        if change or finish is not None or choice["logprobs"] or (self._options.token_ids and delta.token_ids):
            made.append(choice)
        return made


def _call_delta(call: lm.ToolCallDelta) -> dict[str, Any]:
    function: dict[str, str] = {}
    if call.name:
        function["name"] = call.name
    function["arguments"] = call.arguments_json
    made: dict[str, Any] = {"index": call.index}
    if call.id:
        made |= {"id": call.id, "type": "function"}
    made["function"] = function
    return made


class _Choice:
    __slots__ = ("calls", "content", "finish", "logprobs", "reasoning", "stopped", "token_ids")

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, list[str]] = {}  # index -> [id, name, fragments of the arguments ...]
        self.logprobs: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.finish: str | None = None
        self.stopped: str | int | None = None


class ChatCollected:
    """All events of a call that is answered at once."""

    def __init__(self, options: ChatOptions) -> None:
        self._options = options
        self._choices: dict[int, _Choice] = {}
        self._started = lm.Started()
        self.usage = inf.Usage()

    def add(self, message: lm.ChatResponse) -> None:
        """Raises MeshError: ENGINE_FAILED."""
        if message.HasField("started"):
            self._started = message.started
        if message.HasField("usage"):
            self.usage = message.usage
        for delta in message.deltas:
            choice = self._choices.setdefault(delta.choice, _Choice())
            if delta.content:
                choice.content.append(delta.content)
            if delta.reasoning:
                choice.reasoning.append(delta.reasoning)
            for call in delta.tool_calls:
                parts = choice.calls.setdefault(call.index, ["", ""])
                parts[0] = parts[0] or call.id
                parts[1] = parts[1] or call.name
                parts.append(call.arguments_json)
            if self._options.top_logprobs is not None:
                choice.logprobs += chat_logprobs(delta.logprobs, self._options.top_logprobs)
            if self._options.token_ids:
                choice.token_ids += delta.token_ids
            if delta.finish:
                choice.finish = finish_reason(delta.finish)
                choice.stopped = stop_reason(delta)

    def reply(self, model: str, fallback_id: str) -> dict[str, Any]:
        started = self._started
        body: dict[str, Any] = {
            "id": started.id or fallback_id,
            "object": "chat.completion",
            "created": started.created,
            "model": started.model or model,
            "choices": [self._choice(index, choice) for index, choice in sorted(self._choices.items())],
            "usage": usage_json(self.usage),
        }
        if started.prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(started)
        return body

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        content = "".join(choice.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.reasoning and self._options.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {"id": parts[0], "type": "function", "function": {"name": parts[1], "arguments": "".join(parts[2:])}}
                for _, parts in sorted(choice.calls.items())
            ]
        made: dict[str, Any] = {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish}
        if self._options.top_logprobs is not None:
            made["logprobs"] = {"content": choice.logprobs, "refusal": None}
        if self._options.token_ids:
            made["token_ids"] = choice.token_ids
        if choice.stopped is not None:
            made["stop_reason"] = choice.stopped
        return made
