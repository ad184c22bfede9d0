"""An OpenAI-speaking server's answers as events and typed errors. Pure, but for orjson."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Usage
from services.llm.engine import Event, PromptFacts

MAX_LINE_BYTES = 4 << 20
_FINISH = {
    "stop": lm.FINISH_STOP,
    "length": lm.FINISH_LENGTH,
    "tool_calls": lm.FINISH_TOOL_CALLS,
    "function_call": lm.FINISH_TOOL_CALLS,
    "abort": lm.FINISH_ABORT,
}
_TOO_LONG = (
    "context length",
    "context size",
    "context window",
    "maximum context",
    "too many tokens",
    "longer than the",
)


class SseLines:
    """Server-sent events from bytes that come in any pieces: yields the payload of every `data:` event."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """
        Raises:
            MeshError: ENGINE_FAILED, for a line without end.
        """
        self._buffer += piece
        start = 0
        while (end := self._buffer.find(b"\n", start)) >= 0:
            line = bytes(self._buffer[start:end]).rstrip(b"\r")
            start = end + 1
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                payload, self._data = b"\n".join(self._data), []
                yield payload
        del self._buffer[:start]
        if len(self._buffer) > MAX_LINE_BYTES:
            raise MeshError(Reason.ENGINE_FAILED, "the server sent a line without end")

    def rest(self) -> Iterator[bytes]:
        """What an ended stream left without its empty line."""
        yield from self.feed(b"\n\n")


class Reply:
    """The chunks of one answer. `finished` once every choice has its end."""

    def __init__(self, *, chat: bool, choices: int, before: int | None = None) -> None:
        """`before`: tokens of the answer that another server has said, None = it begins here. They are part of this
        server's prompt, and are told as what they are."""
        self._chat = chat
        self._before = before or 0
        self._tells_ids = before is None
        self._open = set(range(choices))
        self._started = False
        self._usage: dict[str, Any] | None = None
        self._counted = 0  # deltas with something in them: what is known when the server tells no usage

    @property
    def finished(self) -> bool:
        return not self._open

    def take(self, payload: bytes) -> Event | None:
        """One chunk; None when it holds nothing that a caller would see.

        Raises:
            MeshError: an error that the server sent inside the stream, or something that is no chunk.
        """
        try:
            chunk = orjson.loads(payload)
            failed = chunk.get("error") or (chunk if chunk.get("object") == "error" else None)
            if failed:
                raise error_of(int_of(failed.get("code"), 500) if isinstance(failed, dict) else 500, payload)
            return self._event(chunk)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise MeshError(Reason.ENGINE_FAILED, "the server sent something that is no chunk of an answer") from None

    def _event(self, chunk: dict[str, Any]) -> Event | None:
        self._usage = chunk.get("usage") or self._usage
        deltas = [delta for choice in chunk.get("choices") or () if (delta := self._delta(choice)) is not None]
        if not deltas:
            return None
        event = Event(deltas)
        if not self._started:
            self._started = True
            usage = self.usage()
            event.prompt = PromptFacts(usage.prompt_tokens, usage.cached_tokens)
        return event

    def end(self) -> Event:
        """The last event. Without usage from the server the prompt is unknown (0 tokens) and the deltas are counted."""
        event = Event(usage=self.usage())
        if not self._started:
            event.prompt = PromptFacts(event.usage.prompt_tokens if event.usage else 0)
        return event

    def cut(self) -> Event:
        """The only event of an answer that has used its tokens up before it came here."""
        event = self.end()
        event.deltas.append(lm.Delta(finish=lm.FINISH_LENGTH))
        return event

    def usage(self) -> Usage:
        told = self._usage or {}
        prompt = told.get("prompt_tokens_details") or {}
        completion = told.get("completion_tokens_details") or {}
        made = int_of(told.get("completion_tokens"), self._counted) if told else self._counted
        prompt_tokens = max(0, int_of(told.get("prompt_tokens")) - self._before)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=made + self._before,
            cached_tokens=min(prompt_tokens, int_of(prompt.get("cached_tokens"))),
            reasoning_tokens=int_of(completion.get("reasoning_tokens")),
        )

    def _delta(self, choice: dict[str, Any]) -> lm.Delta | None:
        body = (choice.get("delta") or {}) if self._chat else {"content": choice.get("text")}
        delta = lm.Delta(
            choice=int_of(choice.get("index")),
            content=body.get("content") or "",
            reasoning=body.get("reasoning_content") or body.get("reasoning") or "",
            token_ids=(choice.get("token_ids") or ()) if self._tells_ids else (),
            tool_calls=[_call(at, call) for at, call in enumerate(body.get("tool_calls") or ())],
            logprobs=_logprobs(choice.get("logprobs") or {}),
        )
        if delta.content or delta.reasoning or delta.tool_calls or delta.token_ids:
            self._counted += 1
        elif not (delta.logprobs or choice.get("finish_reason")):
            return None
        if choice.get("finish_reason"):
            delta.finish = _FINISH.get(choice["finish_reason"], lm.FINISH_STOP)
            self._open.discard(delta.choice)
            stop = choice.get("stop_reason")
            if isinstance(stop, str):
                delta.stop_text = stop
            elif isinstance(stop, int) and stop >= 0:
                delta.stop_token = stop
        return delta


def error_of(status: int, body: bytes, retry_after: str = "") -> MeshError:
    """The server's refusal as ours. What is wrong between us and it (key, model, route) is not the caller's fault."""
    message, code = _explained(body)
    text = f"the server behind this instance: {message}"[:1000]
    if status in (400, 404, 413, 422) and (
        code == "context_length_exceeded" or any(words in message.lower() for words in _TOO_LONG)
    ):
        return MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, text, param="messages")
    if status in (400, 422):
        return MeshError(Reason.INVALID_ARGUMENT, text)
    if status == 413:
        return MeshError(Reason.REQUEST_TOO_LARGE, text)
    if status in (429, 503):
        seconds = float(retry_after) if retry_after.replace(".", "", 1).isdecimal() else 1.0
        return MeshError(Reason.INSTANCE_FULL, text, retry_after_s=seconds)
    if status == 501:
        return MeshError(Reason.UNSUPPORTED, text)
    return MeshError(Reason.ENGINE_FAILED, f"{text} (HTTP {status})")


def _explained(body: bytes) -> tuple[str, str]:
    """Message and code of the error objects that are about: OpenAI's, vLLM's older one, Ollama's, FastAPI's."""
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body[:200].decode("utf-8", "replace") or "no reason given", ""
    error = told.get("error", told) if isinstance(told, dict) else told
    if not isinstance(error, dict):
        return str(error), ""
    message = error.get("message") or error.get("detail") or "no reason given"
    return str(message), str(error.get("code") or "")


def int_of(value: object, default: int = 0) -> int:
    """A count that a server sent, whatever it sent."""
    return value if isinstance(value, int) and 0 <= value < 1 << 32 else default


def _call(at: int, call: dict[str, Any]) -> lm.ToolCallDelta:
    function = call.get("function") or {}
    return lm.ToolCallDelta(
        index=int_of(call.get("index"), at),
        id=call.get("id") or "",
        name=function.get("name") or "",
        arguments_json=function.get("arguments") or "",
    )


def _logprobs(told: dict[str, Any]) -> list[lm.TokenLogprob]:
    """In the form of chats, which llama.cpp uses for completions too, or in that of completions."""
    return _of_chat(told["content"] or ()) if "content" in told else _of_text(told)


def _of_chat(entries: Iterable[dict[str, Any]]) -> list[lm.TokenLogprob]:
    return [
        lm.TokenLogprob(
            token=entry["token"],
            token_bytes=_bytes(entry),
            logprob=entry["logprob"],
            top=[
                lm.TopLogprob(token=top["token"], token_bytes=_bytes(top), logprob=top["logprob"], rank=rank)
                for rank, top in enumerate(entry.get("top_logprobs") or (), 1)
            ],
        )
        for entry in entries
    ]


def _of_text(told: dict[str, Any]) -> list[lm.TokenLogprob]:
    tokens, values = told.get("tokens") or (), told.get("token_logprobs") or ()
    tops = told.get("top_logprobs") or [None] * len(tokens)
    return [
        lm.TokenLogprob(
            token=token,
            token_bytes=token.encode(),
            logprob=value or 0.0,
            top=[
                lm.TopLogprob(token=text, token_bytes=text.encode(), logprob=logprob, rank=rank)
                for rank, (text, logprob) in enumerate(sorted((top or {}).items(), key=lambda item: -item[1]), 1)
            ],
        )
        for token, value, top in zip(tokens, values, tops, strict=False)
    ]


def _bytes(entry: dict[str, Any]) -> bytes:
    raw = entry.get("bytes")
    return bytes(raw) if raw else entry["token"].encode()
