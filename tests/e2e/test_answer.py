"""Answer with real vectors and a real reranker, all through the client."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from infermesh.client import Answer, AsyncClient, Client, MeshError, Reason
from tests.kit.children import Child, infermesh
from tests.kit.embedding import EXPORTS
from tests.kit.mesh import running_mesh, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]
FACTS = {
    "battery": "On a full charge the headphones play music for about thirty hours.",
    "bread": "Bake the bread at 220 degrees for forty minutes.",
    "glacier": "Glaciers move a few metres a year.",
    "train": "The train to Lyon leaves from platform four.",
    "novel": "Her third novel is set in Lisbon.",
    "cats": "Cats sleep for most of the day.",
    "rates": "Interest rates rose by a quarter point.",
    "warranty": "The headphones have a warranty of two years, also on their battery.",
}


async def test_the_passages_that_matter_are_shown_cited_and_found_in_the_cache(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"chat-0": ("--prefill-tps", "1e6", "--step-ms", "1")}) as mesh:
        for kind in ("embedding", "rerank"):
            words = infermesh(kind, "--registry", mesh.registry, "--listen", "127.0.0.1:0", "--grace-s", "5")
            child = Child(tmp_path, f"{kind}-0", [*words, "--instance-id", f"{kind}-0", "--export-dir", str(EXPORTS)])
            mesh.stack.callback(child.destroy)
            await until(lambda child=child: child.serves, 150)
        await mesh.healthy("chat-0", "embedding-0", "rerank-0")
        passages = [{"id": id, "text": text, "document_id": id} for id, text in FACTS.items()]
        question = "How long does the battery of the headphones last?"
        async with AsyncClient(mesh.address) as client:
            answer = await client.answer(question, passages, rerank_top=4, shown=2, max_tokens=5)
            assert [one.id for one in answer.cited] == ["battery", "warranty"]
            assert answer.cited[0].score > answer.cited[1].score > 0
            assert answer.text == " w0 w1 w2 w3 w4" and answer.served.instance_id == "chat-0"
            stages = [(one.name, one.instance_id, one.skipped) for one in answer.stages]
            assert stages == [("embed", "embedding-0", ""), ("rerank", "rerank-0", "")]
            assert all(one.seconds > 0 and one.tokens > 0 for one in answer.stages)

            last = None
            pinned = [one for one in passages if one["id"] in ("battery", "warranty")]
            async for chunk in client.answer_stream(
                "And the warranty?", passages, pinned=pinned, shown=1, max_tokens=2
            ):
                last = chunk.so_far
            assert isinstance(last, Answer) and [one.pinned for one in last.cited] == [True, True, False]
            assert last.usage.cached_tokens > 0.4 * last.usage.prompt_tokens  # what was shown before, in whole blocks

            with pytest.raises(MeshError) as caught:
                await client.answer(question, passages, embedding_model="nope", rerank_top=2, shown=1)
            assert caught.value.reason is Reason.MODEL_NOT_FOUND and caught.value.param == "embedding_model"

        def plain() -> Answer:
            with Client(mesh.address) as client:
                return client.answer(question, FACTS.values(), shown=2, max_tokens=1)

        assert [one.id for one in (await asyncio.to_thread(plain)).cited] == ["0", "7"]
