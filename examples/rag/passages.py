"""Documents -> passages. Pure."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

LONGEST = 800  # characters: what all-MiniLM-L6-v2 reads of dense technical prose (256 tokens)
SPACE = uuid.UUID("9f0a7c3e-6d3b-4f0e-9a53-1d1f4d1c2b57")
_HEADING = re.compile(r"(#{1,6})\s+(.*)")
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n")


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document. `text` begins with the document's name, which helps both the vectors and the reader, and
    without its folder, which would say where somebody keeps it."""

    document: str
    position: int
    text: str

    @property
    def id(self) -> str:
        """The same at every run, whatever the path's length."""
        return str(uuid.uuid5(SPACE, f"{self.document}#{self.position}"))

    @property
    def document_id(self) -> str:
        return str(uuid.uuid5(SPACE, self.document))


def split(document: str, text: str) -> list[Passage]:
    """Markdown by headings and paragraphs, anything else by paragraphs; what is too long by sentences."""
    found: list[Passage] = []
    name = re.sub(r"[-_]+", " ", PurePath(document).stem)
    for heading, body in _sections(text):
        title = (f"{name} › {heading}" if heading else name)[: LONGEST // 3]
        for piece in _packed(body, LONGEST - len(title) - 1):
            found.append(Passage(document, len(found), f"{title}\n{piece}"))
    return found


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """(path of headings, text below it), fenced code untouched."""
    path: list[str] = []
    body: list[str] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else _HEADING.fullmatch(line.strip())
        if heading is None:
            body.append(line)
            continue
        if any(body):
            yield " › ".join(path), "\n".join(body)
        body = []
        path = [*path[: len(heading[1]) - 1], heading[2]]
    if any(body):
        yield " › ".join(path), "\n".join(body)


def _packed(body: str, longest: int) -> Iterator[str]:
    """Paragraphs, as many in a piece as fit."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", body):
        for part in _parts(paragraph.strip(), longest):
            if piece and len(piece) + len(part) + 2 > longest:
                yield piece
                piece = ""
            piece = f"{piece}\n\n{part}" if piece else part
    if piece:
        yield piece


def _parts(paragraph: str, longest: int) -> Iterator[str]:
    if len(paragraph) <= longest:
        if paragraph:
            yield paragraph
        return
    part = ""
    for sentence in _SENTENCE.split(paragraph):
        for start in range(0, len(sentence), longest):
            cut = sentence[start : start + longest]
            if part and len(part) + len(cut) + 1 > longest:
                yield part
                part = ""
            part = f"{part} {cut}" if part else cut
    if part:
        yield part
