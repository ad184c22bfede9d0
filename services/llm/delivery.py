"""Merging the events of a stream, so that many small steps travel in few messages. Pure: time is an argument.

The first event is never held back (it is the time to first token), the last one carries everything that was held.
"""

from __future__ import annotations

from infermesh.v1 import language_model_pb2 as lm
from services.llm.engine import Event


class Coalescer:
    """Holds events until `min_interval_s` have passed since the last one that went out; 0 holds nothing."""

    def __init__(self, min_interval_s: float) -> None:
        self._interval_s = min_interval_s
        self._next_at: float | None = None  # None until the first event went out
        self._held: Event | None = None

    @property
    def due(self) -> float | None:
        """When what is held must go out, on the caller's clock; None when nothing is held."""
        return self._next_at if self._held is not None else None

    def offer(self, event: Event, now: float) -> Event | None:
        """Takes an event over; returns what is to be sent now, if anything."""
        if self._held is not None:
            merge(self._held, event)
        else:
            self._held = event
        if self._next_at is None or self._held.usage is not None or now >= self._next_at:
            return self.flush(now)
        return None

    def flush(self, now: float) -> Event | None:
        """What is held, to be sent now."""
        event, self._held = self._held, None
        if event is not None:
            self._next_at = now + self._interval_s
        return event


def merge(into: Event, event: Event) -> None:
    """Appends an event to an earlier one, choice by choice. `event` is used up; it is never the first of its stream."""
    into.usage = event.usage or into.usage
    choices = {delta.choice: delta for delta in into.deltas}
    for delta in event.deltas:
        first = choices.get(delta.choice)
        if first is None:
            choices[delta.choice] = delta
            into.deltas.append(delta)
        else:
            _append(first, delta)


def _append(into: lm.Delta, delta: lm.Delta) -> None:
    into.token_ids.extend(delta.token_ids)
    into.content += delta.content
    into.reasoning += delta.reasoning
    into.logprobs.extend(delta.logprobs)
    for call in delta.tool_calls:
        _append_call(into, call)
    if delta.finish:
        into.finish = delta.finish
    which = delta.WhichOneof("stop")
    if which == "stop_text":
        into.stop_text = delta.stop_text
    elif which == "stop_token":
        into.stop_token = delta.stop_token


def _append_call(into: lm.Delta, call: lm.ToolCallDelta) -> None:
    for known in reversed(into.tool_calls):  # an event may hold several parts of one call
        if known.index == call.index:
            known.id = known.id or call.id
            known.name = known.name or call.name
            known.arguments_json += call.arguments_json
            return
    into.tool_calls.append(call)
