"""How a query and its documents become scores: the port, and its two ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from infermesh.errors import MeshError, Reason
from services.chassis.encoding.engine import EncodingEngine
from services.chassis.encoding.rows import Floats, Ids, Row
from services.chassis.encoding.tokens import Cut, TooLong, shorten

SMALLEST = 1e-12
INLINE_ROWS = 64  # more than that are built beside the loop
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the names models give it


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be scored. `per_document`: tokens kept of each document; 0 = all that fits."""

    query: str
    documents: Sequence[str]
    cut: Cut = Cut.END
    per_document: int = 0


class Scorer(Protocol):
    async def rows(self, question: Question) -> list[Row]:
        """What the model computes for a question.

        Raises:
            MeshError: CONTEXT_LENGTH_EXCEEDED, naming the document, or INVALID_ARGUMENT.
        """
        ...

    def scores(self, values: Floats, *, raw: bool) -> Floats:
        """One score for each document, from the model's values for `rows`."""
        ...


class CrossScorer:
    """Query and document in one sequence; the model's head scores it."""

    def __init__(self, engine: EncodingEngine) -> None:
        self._engine = engine

    async def rows(self, question: Question) -> list[Row]:
        tokenizer = self._engine.tokenizer
        prompt = self._engine.facts.default_prompt
        found = await self._engine.tokenize([prompt + question.query, *question.documents])
        documents = _bounded(found[1:], question)

        def build() -> list[Row]:
            rows = []
            for index, ids in enumerate(documents):
                try:
                    rows.append(tokenizer.pair_row(found[0], ids, cut=question.cut))
                except TooLong as error:
                    raise _too_long(f"documents[{index}]", f"with the query has {error}") from None
            return rows

        return await self._engine.beside(build) if len(documents) > INLINE_ROWS else build()

    def scores(self, values: Floats, *, raw: bool) -> Floats:
        return values[:, 0 if raw else 1]


class BiScorer:
    """Cosine of the embeddings, -1 .. 1; there is no other, raw number."""

    def __init__(self, engine: EncodingEngine) -> None:
        self._engine = engine

    async def rows(self, question: Question) -> list[Row]:
        facts, tokenizer = self._engine.facts, self._engine.tokenizer
        query_prompt = facts.prompts.get("query", facts.default_prompt)
        named = next((name for name in DOCUMENT_PROMPTS if name in facts.prompts), "")
        prompt = facts.prompts[named] if named else facts.default_prompt
        found = await self._engine.tokenize([query_prompt + question.query, *(prompt + d for d in question.documents)])
        sequences = [found[0], *_bounded(found[1:], question)]
        skips = [
            tokenizer.prompt_tokens(lead) if lead and not facts.pools_prompt else 0 for lead in (query_prompt, prompt)
        ]

        def build() -> list[Row]:
            rows = []
            for index, ids in enumerate(sequences):
                try:
                    rows.append(tokenizer.row(ids, cut=question.cut, skip=skips[min(index, 1)]))
                except TooLong as error:
                    raise _too_long(f"documents[{index - 1}]" if index else "query", f"has {error}") from None
            return rows

        return await self._engine.beside(build) if len(sequences) > INLINE_ROWS else build()

    def scores(self, values: Floats, *, raw: bool) -> Floats:
        unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), SMALLEST)
        return unit[1:] @ unit[0]


def _bounded(documents: list[Ids], question: Question) -> list[Ids]:
    """The documents, cut at the caller's own bound."""
    limit = question.per_document
    if not limit:
        return documents
    if question.cut is Cut.NONE:
        for index, ids in enumerate(documents):
            if len(ids) > limit:
                raise _too_long(f"documents[{index}]", f"has {TooLong(len(ids), limit)}")
    return [shorten(ids, limit, question.cut) for ids in documents]


def _too_long(param: str, what: str) -> MeshError:
    return MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, f"{param} {what}", param=param)


def ranked(scores: Floats, top_n: int) -> list[int]:
    """Indices, best first; equals keep the caller's order."""
    order = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))
    return order[: top_n or None]
