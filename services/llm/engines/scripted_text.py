"""Text of the scripted engine: one word a token, both ways, and stop strings. Pure.

The words of its answers, ` w0`, ` w1`, … have their numbers as ids. Any other piece of text has the id of its hash, the
same in every process, and is remembered so that the id can be turned back into text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator

from infermesh.errors import invalid

FIRST_HASHED = 1 << 31
_PIECE = re.compile(r"\s?\S{1,24}|\s")
_ANSWER = re.compile(r" w(0|[1-9]\d{0,8})")


def word(number: int) -> str:
    return f" w{number}"


class Words:
    """Text <-> token ids. Remembers at most `capacity` foreign pieces; the oldest are forgotten first."""

    def __init__(self, capacity: int = 1 << 19) -> None:
        self._capacity = capacity
        self._ids: dict[str, int] = {}
        self._texts: dict[int, str] = {}

    def encode(self, text: str) -> Iterator[int]:
        """Token ids, one by one, so that a caller can breathe in between. Joined, their texts are the text again."""
        for match in _PIECE.finditer(text):
            piece = match.group()
            known = self._ids.get(piece)
            yield self._learn(piece) if known is None else known

    def text(self, token_id: int) -> str:
        """
        Raises:
            MeshError: INVALID_ARGUMENT, for an id that stands for nothing here.
        """
        if token_id < FIRST_HASHED:
            return word(token_id)
        try:
            return self._texts[token_id]
        except KeyError:
            raise invalid("token_ids", f"{token_id} is no token of this model") from None

    def decode(self, token_ids: Iterable[int]) -> str:
        return "".join(map(self.text, token_ids))

    def _learn(self, piece: str) -> int:
        if match := _ANSWER.fullmatch(piece):
            return int(match.group(1))
        token_id = FIRST_HASHED | zlib.crc32(piece.encode("utf-8", "surrogatepass"))
        while self._texts.get(token_id, piece) != piece:
            token_id = FIRST_HASHED | (token_id + 1)
        if len(self._ids) >= self._capacity:
            oldest = next(iter(self._ids))
            del self._texts[self._ids.pop(oldest)]
        self._ids[piece] = token_id
        self._texts[token_id] = piece
        return token_id


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces, and never lets the start of one out too early."""

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found = ""  # the stop string that ended the text

    def feed(self, piece: str) -> str:
        """The text that may go out now."""
        if not self._stops:
            return piece
        text = self._held + piece
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return text[: at + len(self.found)] if self._include else text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What is still held when the text ends otherwise."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
