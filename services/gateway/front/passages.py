"""A question and its passages: checks, ranking by vectors, and the prompt. Pure.

The prompt begins with what changes least (instructions, pinned passages, then the others by document and position) and
ends with the question, so that questions about the same passages share a prefix that the engine has cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infermesh.errors import invalid
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import retrieve_pb2 as rt

MAX_PASSAGES = 2048
MAX_RERANK = 1000
MAX_SHOWN = 100
RERANK_TOP = 50
TOP_K = 5
INSTRUCTIONS = (
    "Answer the question from the numbered passages and cite the ones you use, like [2]. "
    "If they do not hold the answer, say so."
)


@dataclass(frozen=True, slots=True)
class Known:
    """A passage of the request. `order`: its place among the candidates as they came. `score`: by the last stage that
    ranked it, 0 before."""

    id: str
    text: str
    document_id: str
    position: int
    vector: bytes
    order: int
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Question:
    """A request that passed the checks. `candidates` are without those that are pinned."""

    text: str
    candidates: tuple[Known, ...]
    pinned: tuple[Known, ...]
    rerank_top: int
    top_k: int


def question(request: rt.AnswerRequest) -> Question:
    """Raises:
    MeshError: INVALID_ARGUMENT naming the field.
    """
    if not request.question.strip():
        raise invalid("question", "must not be empty")
    count = len(request.candidates) + len(request.pinned)
    if not 1 <= count <= MAX_PASSAGES:
        raise invalid("candidates", f"{count} passages, allowed are 1 .. {MAX_PASSAGES}")
    if request.rerank_top > MAX_RERANK:
        raise invalid("rerank_top", f"at most {MAX_RERANK}")
    if request.top_k > MAX_SHOWN:
        raise invalid("top_k", f"at most {MAX_SHOWN}")
    if len(request.pinned) > MAX_SHOWN:
        raise invalid("pinned", f"{len(request.pinned)} entries, at most {MAX_SHOWN}")
    if request.sampling.n > 1:
        raise invalid("sampling.n", "must be 1: an answer is one text")
    pinned = _known("pinned", request.pinned)
    held = {one.id for one in pinned}
    candidates = tuple(one for one in _known("candidates", request.candidates) if one.id not in held)
    return Question(request.question, candidates, pinned, request.rerank_top or RERANK_TOP, request.top_k or TOP_K)


def _known(field: str, passages: Sequence[rt.Passage]) -> tuple[Known, ...]:
    found: dict[str, Known] = {}
    size = 0
    for index, passage in enumerate(passages):
        at = f"{field}[{index}]"
        if not passage.text.strip():
            raise invalid(f"{at}.text", "must not be empty")
        for name in ("id", "document_id"):
            if len(getattr(passage, name).encode()) > 256:
                raise invalid(f"{at}.{name}", "at most 256 bytes")
        vector = passage.vector.packed
        if len(vector) % 4 or (vector and size and len(vector) != size):
            raise invalid(f"{at}.vector", f"{len(vector)} bytes; float32 vectors of one length are needed")
        size = len(vector) or size
        id = passage.id or str(index)
        if id in found:
            raise invalid(f"{at}.id", f"{id!r} is there twice")
        found[id] = Known(id, passage.text, passage.document_id, passage.position, vector, index)
    return tuple(found.values())


def similarities(question: bytes, vectors: Sequence[bytes]) -> list[float]:
    """Cosine of the question's vector with each of the others; float32, packed. A zero vector is like nothing.

    Raises:
        MeshError: INVALID_ARGUMENT when their lengths differ.
    """
    if any(len(vector) != len(question) for vector in vectors):
        theirs = next(len(vector) for vector in vectors if len(vector) != len(question)) // 4
        raise invalid(
            "candidates", f"vectors of {theirs} components, while the embedding model gives {len(question) // 4}"
        )
    asked = np.frombuffer(question, "<f4")
    rows = np.frombuffer(b"".join(vectors), "<f4").reshape(len(vectors), -1)
    length = np.linalg.norm(rows, axis=1) * np.linalg.norm(asked)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(length > 0, rows @ asked / length, 0.0)
    return [float(value) for value in np.nan_to_num(found)]


def best(ranked: Sequence[Known], count: int) -> tuple[Known, ...]:
    """The highest scores first; equal ones as they came."""
    return tuple(sorted(ranked, key=lambda one: (-one.score, one.order))[:count])


def shown(pinned: Sequence[Known], chosen: Sequence[Known]) -> tuple[Known, ...]:
    """In the order of the prompt, which does not depend on the scores."""
    return (*pinned, *sorted(chosen, key=lambda one: (one.document_id, one.position, one.id)))


def document(passages: Sequence[Known]) -> str:
    """The one document that all are of, or nothing."""
    found = {one.document_id for one in passages}
    return found.pop() if len(found) == 1 else ""


def conversation(request: rt.AnswerRequest, passages: Sequence[Known]) -> list[lm.Message]:
    numbered = [f"[{number}] {one.text.strip()}" for number, one in enumerate(passages, 1)]
    asked = "\n\n".join([*numbered, f"Question: {request.question.strip()}"])
    return [
        lm.Message(role=lm.ROLE_SYSTEM, content=request.instructions or INSTRUCTIONS),
        lm.Message(role=lm.ROLE_USER, content=asked),
    ]
