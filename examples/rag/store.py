"""Passages and their vectors in a folder: Qdrant's embedded mode, whose API is that of a Qdrant server."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, FieldCondition, Filter, MatchAny, PointStruct, Range, VectorParams

from examples.rag.passages import Passage

PASSAGES = "passages"


class StoreError(Exception):
    """The store cannot be used, and what to do."""


@dataclass(frozen=True, slots=True)
class Found:
    passage: Passage
    score: float
    vector: Sequence[float]


@dataclass(slots=True)
class Manifest:
    """What is in the store: `documents` maps each path to the digest of its content and its number of passages."""

    model: str = ""
    dimensions: int = 0
    documents: dict[str, tuple[str, int]] = field(default_factory=dict)


class Store:
    """Used as a context manager; one process at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "manifest.json"
        try:
            self._client = QdrantClient(path=str(folder / "qdrant"))
        except RuntimeError as error:
            raise StoreError(f"{folder} is in use by another process; wait for it, or give another --store") from error
        try:
            said = json.loads(self._file.read_text()) if self._file.exists() else {}
            documents = {path: (digest, count) for path, (digest, count) in said.get("documents", {}).items()}
            self.manifest = Manifest(said.get("model", ""), said.get("dimensions", 0), documents)
        except (ValueError, AttributeError, TypeError) as error:
            self._client.close()
            raise StoreError(f"{self._file} cannot be read ({error}); delete {folder} and index again") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._client.close()

    def begin(self, model: str, dimensions: int) -> None:
        """Vectors of another model cannot be compared: the store starts anew."""
        known = self.manifest
        if (known.model, known.dimensions) == (model, dimensions) and self._client.collection_exists(PASSAGES):
            return
        self._file.unlink(missing_ok=True)
        self._client.delete_collection(PASSAGES)
        self._client.create_collection(PASSAGES, VectorParams(size=dimensions, distance=Distance.COSINE))
        self.manifest = Manifest(model, dimensions)

    def add(self, passages: Sequence[Passage], vectors: Iterable[Sequence[float]]) -> None:
        points = [
            PointStruct(
                id=one.id,
                vector=list(vector),
                payload={"document": one.document, "position": one.position, "text": one.text},
            )
            for one, vector in zip(passages, vectors, strict=True)
        ]
        self._client.upsert(PASSAGES, points)

    def finish(self, documents: dict[str, tuple[str, int]]) -> None:
        """The store now holds exactly these: what is gone, or shorter than before, leaves."""
        gone = [path for path in self.manifest.documents if path not in documents]
        if gone:
            self._client.delete(PASSAGES, Filter(must=[FieldCondition(key="document", match=MatchAny(any=gone))]))
        for path, (_, count) in documents.items():
            if self.manifest.documents.get(path, ("", 0))[1] > count:
                longer = FieldCondition(key="position", range=Range(gte=count))
                own = FieldCondition(key="document", match=MatchAny(any=[path]))
                self._client.delete(PASSAGES, Filter(must=[own, longer]))
        self.manifest.documents = documents
        known = self.manifest
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps({"model": known.model, "dimensions": known.dimensions, "documents": documents}))
        os.replace(draft, self._file)

    def document(self, name: str, most: int) -> list[Passage]:
        """A document's first passages, in order.

        Raises:
            StoreError: it is not indexed.
        """
        matches = [path for path in self.manifest.documents if path == name or path.endswith(f"/{name}")]
        if len(matches) != 1:
            what = "is not indexed" if not matches else f"may be {' or '.join(matches)}"
            raise StoreError(f"{name} {what}; `python -m examples.rag index` indexes, and says what")
        own = Filter(must=[FieldCondition(key="document", match=MatchAny(any=matches))])
        points, _ = self._client.scroll(PASSAGES, own, limit=self.manifest.documents[matches[0]][1] or 1)
        return sorted(map(_passage, points), key=lambda one: one.position)[:most]

    def search(self, vector: Sequence[float], count: int) -> list[Found]:
        """The nearest passages, best first.

        Raises:
            StoreError: nothing has been indexed.
        """
        if not self.manifest.documents:
            raise StoreError("nothing is indexed yet: run `python -m examples.rag index FOLDER` first")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the embedded mode says that it is slow beyond 20,000 points
            points = self._client.query_points(PASSAGES, query=list(vector), limit=count, with_vectors=True).points
        return [Found(_passage(point), point.score, cast(list[float], point.vector)) for point in points]


def _passage(point: Any) -> Passage:
    return Passage(point.payload["document"], point.payload["position"], point.payload["text"])
