"""Settings of one rerank instance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from services.chassis.encoding.settings import EncodingSettings

ScorerName = Literal["auto", "cross-encoder", "bi-encoder"]
HEADS = ("ForSequenceClassification", "ForCausalLM")


class RerankSettings(EncodingSettings):
    """`scorer`: a cross-encoder reads query and document together; a bi-encoder compares their embeddings."""

    kind: Literal["rerank"] = "rerank"
    scorer: ScorerName = "auto"


def choose_scorer(asked: ScorerName, source: str) -> tuple[Literal["cross-encoder", "bi-encoder"], str]:
    """The scorer and why. `auto` reads the model folder: a head that gives scores makes a cross-encoder. What is not a
    folder (a hub name) is taken for a cross-encoder, as most rerankers are; say `bi-encoder` for an embedding model.
    """
    if asked != "auto":
        return asked, "asked for"
    folder = Path(source)
    if not folder.is_dir():
        return "cross-encoder", "auto: a hub name"
    try:
        heads = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    except (OSError, ValueError):
        return "bi-encoder", "auto: no config.json with an architecture"
    if str(heads[0]).endswith(HEADS):
        return "cross-encoder", f"auto: {heads[0]}"
    return "bi-encoder", f"auto: {heads[0]} has no classification head"
