"""A mesh that can answer from passages: real embedding and rerank models beside scripted language models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.kit.children import Child, infermesh
from tests.kit.embedding import EXPORTS
from tests.kit.mesh import TestMesh, running_mesh, until

ALONE = {"chat-0": ("--prefill-tps", "1e6", "--step-ms", "1")}


@asynccontextmanager
async def answering_mesh(
    folder: Path, instances: Mapping[str, tuple[str, ...]] = ALONE, flags: tuple[str, ...] = (), **settings: Any
) -> AsyncIterator[TestMesh]:
    """`instances`: id -> further flags of `infermesh llm`; `flags`: of the other two. All are healthy at first."""
    async with running_mesh(folder, dict(instances), **settings) as mesh:
        children = []
        for kind in ("embedding", "rerank"):
            words = infermesh(kind, "--registry", mesh.registry, "--listen", "127.0.0.1:0", "--grace-s", "5")
            child = Child(
                folder, f"{kind}-0", [*words, "--instance-id", f"{kind}-0", "--export-dir", str(EXPORTS), *flags]
            )
            mesh.stack.callback(child.destroy)
            children.append(child)
        await until(lambda: all(child.serves for child in children), 180)
        await mesh.healthy(*instances, "embedding-0", "rerank-0")
        yield mesh
