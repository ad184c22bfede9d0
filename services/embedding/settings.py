"""Settings of one embedding instance."""

from __future__ import annotations

from typing import Literal

from services.chassis.encoding.settings import EncodingSettings


class EmbeddingSettings(EncodingSettings):
    kind: Literal["embedding"] = "embedding"
