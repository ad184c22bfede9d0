"""What a caller has of an answer so far: enough for another instance to go on exactly there."""

from __future__ import annotations

from array import array
from typing import Any

from infermesh.v1.inference_pb2 import Resume, Usage


class Transcript:
    """Of one answer of one choice. Holds four bytes a token, so `max_tokens` or the context bounds it; the text only
    where `keep_text` says so, for instances that know no token ids.
    """

    __slots__ = ("_pieces", "called", "finished", "ids", "keep_text", "reasoned", "started")

    def __init__(self) -> None:
        self.ids = array("I")
        self.keep_text = False
        self.clear()

    def clear(self) -> None:
        """Nothing of it is with the caller: the answer begins anew."""
        del self.ids[:]
        self._pieces: list[str] = []
        self.started: Any = None  # the first message's
        self.called = False  # a tool call is among it
        self.reasoned = False  # known where the text is kept
        self.finished = False  # only the usage is missing

    def take(self, delta: Any) -> None:
        """One more delta, about to go to the caller."""
        self.ids.extend(delta.token_ids)
        if delta.tool_calls:
            self.called = True
        if delta.finish:
            self.finished = True
        if self.keep_text:
            self._pieces.append(delta.content)
            self.reasoned = self.reasoned or bool(delta.reasoning)

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def tokens(self) -> int:
        """Delivered tokens, as far as they have been told apart: without ids, an event counts as one."""
        return len(self.ids) or sum(map(bool, self._pieces))

    def resume(self) -> Resume:
        """What the next instance is to be told."""
        started = self.started
        return Resume(
            token_ids=self.ids,
            text=self.text,
            response_id=started.id if started is not None else "",
            created=started.created if started is not None else 0,
        )

    def usage(self) -> Usage:
        """Of an answer whose end has come and whose last message has not."""
        started = self.started
        return Usage(
            prompt_tokens=started.prompt_tokens if started is not None else 0,
            completion_tokens=self.tokens,
            cached_tokens=started.cached_tokens if started is not None else 0,
        )
