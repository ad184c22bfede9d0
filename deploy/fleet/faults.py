"""A fault of a fleet file, and how one is told. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong: where (models[0].kind), and what is allowed there."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def causes(errors: Iterable[Any]) -> list[Any]:
    """Pydantic's errors without those that only follow from others: a list whose entries are wrong counts as empty."""
    found = list(errors)
    return [one for one in found if one["type"] != "too_short" or not any(_inside(other, one) for other in found)]


def _inside(inner: Any, outer: Any) -> bool:
    depth = len(outer["loc"])
    return len(inner["loc"]) > depth and inner["loc"][:depth] == outer["loc"]


def known(path: str, name: str, names: list[str]) -> Iterator[Fault]:
    """A fault where the name is not among those that are there."""
    if name not in names:
        yield Fault(path, f"{name!r} is not there{hint(name, names)}")


def hint(word: str, words: list[str]) -> str:
    """What was probably meant, and what is allowed."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    meant = f"; did you mean `{close[0]}`?" if close else ""
    return f"{meant} (allowed: {', '.join(words) or 'none'})"
