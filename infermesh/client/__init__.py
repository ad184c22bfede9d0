"""The Python client: `AsyncClient` and `Client` speak to one gateway or several, and to a single instance just as well.

    from infermesh.client import Client

    with Client() as mesh:
        print(mesh.chat("Why is the sky blue?", model="qwen2.5-0.5b-instruct").text)

`AsyncDirectClient` and `DirectClient` are the same in direct mode: a gateway chooses and reserves, and they call the
instance themselves.

What fails raises `MeshError`, whose `reason` is of a closed list. Needs grpcio and protobuf, nothing else.
"""

from infermesh.client.aio import AsyncClient
from infermesh.client.aio_direct import AsyncDirectClient
from infermesh.client.requests import SamplingOptions
from infermesh.client.results import Answer, Choice, Chunk, Completion, Embeddings, Hit, Rerank, Served, ToolCall
from infermesh.client.sync import Client
from infermesh.client.sync_direct import DirectClient
from infermesh.errors import MeshError, Reason

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncDirectClient",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "DirectClient",
    "Embeddings",
    "Hit",
    "MeshError",
    "Reason",
    "Rerank",
    "SamplingOptions",
    "Served",
    "ToolCall",
]
