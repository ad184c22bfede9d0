"""How often the passages that a question needs are among the first that the mesh chooses (recall@k)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.rag.assistant import Assistant
from examples.rag.store import Store
from infermesh.client import Client

QUESTIONS = Path(__file__).with_name("questions.yaml")


@dataclass(frozen=True, slots=True)
class Expected:
    question: str
    document: str  # the end of its path
    says: str  # in the passage


@dataclass(frozen=True, slots=True)
class Verdict:
    expected: Expected
    found: tuple[str, ...]  # documents, in the order of the prompt
    hit: bool


def questions(file: Path = QUESTIONS) -> list[Expected]:
    return [Expected(**line) for line in yaml.safe_load(file.read_text())]


def evaluate(asked: list[Expected], store: Store, mesh: Client, k: int, **options: Any) -> Iterator[Verdict]:
    """One answer of one token each: what is measured is what the language model is shown."""
    for one in asked:
        assistant = Assistant(store, mesh, **{**options, "max_tokens": 1})
        for _ in assistant.ask(one.question, shown=k):
            pass
        right = [
            passage.document.endswith(one.document) and one.says.lower() in passage.text.lower()
            for passage in assistant.shown
        ]
        yield Verdict(one, tuple(passage.document for passage in assistant.shown), any(right))
