"""Questions with a memory: a follow-up keeps the passages shown before in front, where the engine has them cached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from examples.rag.passages import Passage
from examples.rag.store import Found, Store
from infermesh.client import Answer, Chunk, Client

CANDIDATES = 50  # of the store, for the reranker
SHOWN = 5
ADDED = 1  # passages that a follow-up brings along
MOST_PINNED = 12
MOST_OF_A_DOCUMENT = 16  # passages of 800 characters: about 6,200 tokens of the smallest model that `up` starts


class Assistant:
    """`document`: talk about this one, all of which is shown first. `options` are those of the client's `answer`:
    chat_model, rerank_model, max_tokens …"""

    def __init__(self, store: Store, mesh: Client, *, document: str = "", **options: Any) -> None:
        self._store = store
        self._mesh = mesh
        self._options = options
        self._document = store.document(document, MOST_OF_A_DOCUMENT) if document else []
        self._shown: list[Passage] = []

    @property
    def shown(self) -> list[Passage]:
        """What the last answer was made from: `[1]` is the first."""
        return self._shown

    def ask(self, question: str, *, shown: int = SHOWN) -> Iterator[Chunk]:
        """The answer as it is made; `chunk.so_far` is an `Answer`."""
        pinned, found = self._document, list[Found]()
        if not pinned:
            vector = self._mesh.embed(question, model=self._store.manifest.model)[0]
            found = self._store.search(vector, CANDIDATES)
            if follows(found, self._shown):
                pinned = self._shown[:MOST_PINNED]
            if found[0].passage in pinned:
                found = []  # what the question needs is in front already
        passages = {one.passage.id: one.passage for one in found} | {one.id: one for one in pinned}
        last = Answer()
        for chunk in self._mesh.answer_stream(
            question,
            [_given(one.passage) | {"vector": one.vector} for one in found],
            pinned=[_given(one) for one in pinned],
            shown=ADDED if pinned else shown,
            rerank_top=CANDIDATES,
            **self._options,
        ):
            assert isinstance(chunk.so_far, Answer)
            last = chunk.so_far
            yield chunk
        self._shown = [passages[one.id] for one in last.cited]


def follows(found: list[Found], shown: list[Passage]) -> bool:
    """Is the question about the documents of the one before? Most of its three nearest passages are of them."""
    before = {one.document for one in shown}
    return sum(one.passage.document in before for one in found[:3]) >= 2


def _given(passage: Passage) -> dict[str, Any]:
    return {
        "id": passage.id,
        "text": passage.text,
        "document_id": passage.document_id,
        "position": passage.position,
    }
