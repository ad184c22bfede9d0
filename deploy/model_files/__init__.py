"""Reads what model files say of themselves, for the planner: config.json with the sizes of the weight files beside it,
GGUF headers (split files too), a hub model that is on the disk already. Downloads nothing."""

from __future__ import annotations

from deploy.model_files.read import Read, read_models

__all__ = ["Read", "read_models"]
