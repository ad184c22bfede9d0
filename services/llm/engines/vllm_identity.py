"""What makes two hosts' copies of a model equal, found without reading all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt")
SAMPLES = 32  # places of a weight file that are read
SAMPLE_BYTES = 16 << 10
DIGITS = 16


def weights_version(model: Path, settings: dict[str, str]) -> str:
    """Of the configuration, every weight file's name and size, its beginning and samples spread over it, and what the
    operator changed about the numbers (`settings`: dtype, quantization …). A fine-tune differs everywhere, so that
    samples tell it from its base; reading half a terabyte at every start would not be cheap.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    folder = model if model.is_dir() else model.parent
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)} if model.is_dir() else {model}):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    _add_files(digest, folder, ["config.json"])
    return digest.hexdigest()[:DIGITS]


def tokenizer_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    _add_files(digest, folder, TOKENIZER)
    return digest.hexdigest()[:DIGITS]


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _add_files(digest: hashlib._Hash, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
