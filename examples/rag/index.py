"""A folder of documents -> the store: only what changed is embedded, in bulk, through `EmbedStream`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.rag.passages import Passage, split
from examples.rag.store import Store
from infermesh.client import Client

SUFFIXES = frozenset({".md", ".txt", ".rst"})
BATCH = 64  # passages
LARGEST = 4 << 20  # bytes of a document


@dataclass(frozen=True, slots=True)
class Indexed:
    documents: int
    passages: int
    embedded: int
    skipped: tuple[str, ...] = ()  # and why


def documents(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and those below folders; hidden ones are left out."""
    for path in paths:
        if path.is_file():
            yield path
        for file in sorted(path.rglob("*")) if path.is_dir() else ():
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.suffix in SUFFIXES and file.is_file() and not hidden:
                yield file


def index(
    paths: Iterable[Path], store: Store, mesh: Client, model: str, progress: Callable[[int, int], None]
) -> Indexed:
    """`progress` takes passages embedded and passages to embed."""
    store.begin(model, mesh.embed("How long are your vectors?", model=model).dimensions)
    known = store.manifest.documents
    kept: dict[str, tuple[str, int]] = {}
    fresh: list[Passage] = []
    skipped = []
    for file in dict.fromkeys(documents(paths)):
        name = file.as_posix()
        try:
            content = file.read_bytes()
            text = content.decode()
        except (OSError, UnicodeDecodeError) as error:
            skipped.append(f"{name}: {error}")
            continue
        if len(content) > LARGEST:
            skipped.append(f"{name}: larger than {LARGEST >> 20} MiB")
            continue
        digest = hashlib.sha256(content).hexdigest()
        if known.get(name, ("", 0))[0] == digest:
            kept[name] = known[name]
            continue
        passages = split(name, text)
        kept[name] = (digest, len(passages))
        fresh += passages
    batches = [fresh[start : start + BATCH] for start in range(0, len(fresh), BATCH)]
    texts = ([one.text for one in batch] for batch in batches)
    done = 0
    progress(0, len(fresh))
    for batch, vectors in zip(batches, mesh.embed_stream(texts, model=model), strict=True):
        store.add(batch, vectors)
        done += len(batch)
        progress(done, len(fresh))
    store.finish(kept)
    return Indexed(len(kept), sum(count for _, count in kept.values()), len(fresh), tuple(skipped))
