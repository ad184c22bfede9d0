"""`infermesh embedding`: one embedding service in the foreground."""

from __future__ import annotations

from typing import Any

from infermesh.cli import encoding_options as options

SETTINGS: dict[str, dict[str, str]] = {"services.embedding.settings:EmbeddingSettings": {}}


@options.takes()
def command(**chosen: Any) -> int:
    """Run one embedding service: sentence-transformers in worker processes, devices x replicas of them.

    It registers itself, serves gRPC, and leaves on SIGTERM after finishing what is running.

    Examples:
        infermesh embedding --registry consul://10.0.0.5:8500
        infermesh embedding --model bge-m3 --source BAAI/bge-m3 --devices cuda:2,cuda:3 --replicas 2
        infermesh embedding --model gte --source ./gte-small --backend openvino --threads 4
    """
    found = options.given(chosen)
    import asyncio

    from services.embedding.app import run
    from services.embedding.settings import EmbeddingSettings

    return asyncio.run(run(EmbeddingSettings(**found)))
