"""Texts to token ids, exactly as the model's own pipeline does it, without the model's library.

The replica sends its tokenizer as JSON after its pipeline has prepared it, so both tokenise alike. `tokenizers` works
outside the interpreter lock, so `encode` may run in a thread beside the event loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from infermesh.errors import invalid
from infermesh.v1 import embedding_pb2 as em
from services.chassis.encoding.rows import Ids, Row

CHUNK = 64  # texts tokenised in one go, so that a cancelled request does not hold its thread for long


class Cut(Enum):
    """Which side of a sequence goes when it is too long."""

    NONE = "none"
    END = "end"
    START = "start"


_CUTS: dict[int, Cut] = {
    em.TRUNCATION_UNSPECIFIED: Cut.END,
    em.TRUNCATION_NONE: Cut.NONE,
    em.TRUNCATION_END: Cut.END,
    em.TRUNCATION_START: Cut.START,
}


def cut_of(truncation: int) -> Cut:
    """What a request's `truncation` means.

    Raises:
        MeshError: INVALID_ARGUMENT, for a number of no meaning.
    """
    if truncation not in _CUTS:
        raise invalid("truncation", "must be none, end or start")
    return _CUTS[truncation]


class TooLong(Exception):
    """A sequence exceeds its limit and may not be cut."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"{tokens} tokens, at most {limit}; shorten it or let it be truncated")


@dataclass(frozen=True, slots=True)
class Part:
    """Special tokens between sequences, with their segments."""

    ids: Ids
    types: NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Frame:
    """What the model puts around a sequence or a pair: `parts[0] A parts[1]` or `parts[0] A parts[1] B parts[2]`."""

    parts: tuple[Part, ...]
    types: tuple[int, ...]  # segment of each sequence

    @property
    def specials(self) -> int:
        return sum(len(part.ids) for part in self.parts)


class TextTokenizer:
    """`limit` is the longest row the model takes, special tokens included."""

    def __init__(self, serialised: str, limit: int) -> None:
        self._tokenizer = Tokenizer.from_str(serialised)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.limit = limit
        self.digest = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]
        self.single = _learn(self._tokenizer.encode("a"), 1)
        self.pair = _learn(self._tokenizer.encode("a", "a"), 2)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids without special tokens."""
        found: list[Ids] = []
        for start in range(0, len(texts), CHUNK):
            batch = self._tokenizer.encode_batch_fast(list(texts[start : start + CHUNK]), add_special_tokens=False)
            found += [np.array(encoding.ids, np.int32) for encoding in batch]
        return found

    def prompt_tokens(self, prompt: str) -> int:
        """Length of a prompt at the head of a row, leading special tokens included."""
        return len(self._tokenizer.encode(prompt, add_special_tokens=False)) + len(self.single.parts[0].ids)

    def row(self, ids: Ids, *, cut: Cut = Cut.END, limit: int = 0, skip: int = 0) -> Row:
        """One sequence between the model's special tokens, `limit` tokens in all (0 = the model's own limit).

        Raises:
            TooLong: it is longer and `cut` is NONE.
        """
        room = min(limit or self.limit, self.limit) - self.single.specials
        if cut is Cut.NONE and len(ids) > room:
            raise TooLong(len(ids) + self.single.specials, room + self.single.specials)
        before, after = self.single.parts
        return Row(np.concatenate([before.ids, shorten(ids, max(0, room), cut), after.ids]), skip=skip)

    def pair_row(self, first: Ids, second: Ids, *, cut: Cut = Cut.END) -> Row:
        """Two sequences in one row; the longer one is cut first.

        Raises:
            TooLong: they are longer together and `cut` is NONE.
        """
        room = max(0, self.limit - self.pair.specials)
        if cut is Cut.NONE and len(first) + len(second) > room:
            raise TooLong(len(first) + len(second) + self.pair.specials, self.limit)
        n, m = share_room(len(first), len(second), room)
        first, second = shorten(first, n, cut), shorten(second, m, cut)
        before, between, after = self.pair.parts
        ids = np.concatenate([before.ids, first, between.ids, second, after.ids])
        one, two = (
            np.full(len(ids_), kind, np.int8) for ids_, kind in zip((first, second), self.pair.types, strict=True)
        )
        types = np.concatenate([before.types, one, between.types, two, after.types])
        return Row(ids, types if types.any() else None)


def shorten(ids: Ids, room: int, cut: Cut) -> Ids:
    if len(ids) <= room:
        return ids
    return ids[len(ids) - room :] if cut is Cut.START else ids[:room]


def share_room(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of a pair that fits: the longer one is cut, then both to halves ("longest first")."""
    if first + second <= room:
        return first, second
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (short, long) if first <= second else (long, short)


def _learn(encoding: Encoding, sequences: int) -> Frame:
    """The special tokens around the sequences of a sample."""
    where: list[int | None] = encoding.sequence_ids
    ids, types = np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int8)
    bounds = [0]
    kinds = []
    for sequence in range(sequences):
        places = [at for at, value in enumerate(where) if value == sequence]
        bounds += [places[0], places[-1] + 1]
        kinds.append(int(types[places[0]]))
    bounds.append(len(ids))
    spans = [slice(bounds[i], bounds[i + 1]) for i in range(0, len(bounds), 2)]
    return Frame(tuple(Part(ids[span], types[span]) for span in spans), tuple(kinds))
