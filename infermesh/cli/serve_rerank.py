"""The service half of `infermesh rerank`: one rerank service in the foreground."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from infermesh.cli import encoding_options as options

SCORER = Annotated[str | None, typer.Option(help="auto, cross-encoder or bi-encoder.")]


@options.takes(scorer=SCORER)
def command(**chosen: Any) -> int:
    """Run one rerank service: a cross-encoder, or any embedding model by cosine.

    It registers itself, serves gRPC, and leaves on SIGTERM after finishing what is running.

    Examples:
        infermesh rerank --listen 127.0.0.1:0 --registry mesh://10.0.0.5:50049
        infermesh rerank --model bge-reranker --source BAAI/bge-reranker-v2-m3 --devices cuda:0
    """
    found = options.given(chosen)
    import asyncio

    from services.rerank.app import serve
    from services.rerank.settings import RerankSettings

    return asyncio.run(serve(RerankSettings(**found)))
