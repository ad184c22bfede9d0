"""Answer with real vectors and a real reranker, all through the client."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.rag.assistant import Assistant
from examples.rag.evaluate import evaluate, questions
from examples.rag.index import index
from examples.rag.store import Store, StoreError
from infermesh.client import Answer, AsyncClient, AsyncDirectClient, Client, MeshError, Reason
from tests.kit.answering import answering_mesh
from tests.kit.children import ROOT
from tests.kit.embedding import MODEL

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
    async with answering_mesh(tmp_path) as mesh:
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

            async with AsyncDirectClient(mesh.address) as direct:
                for ask in (direct, client):
                    vectors = await ask.embed(list(FACTS.values())[:2], model=MODEL)
                    ranked = await ask.rerank(question, list(FACTS.values()), model=MODEL, top_n=1)
                    assert (len(vectors), vectors.dimensions, ranked.hits[0].index) == (2, 384, 0)
                    assert (vectors.served.instance_id, ranked.served.instance_id) == ("embedding-0", "rerank-0")

        def plain() -> Answer:
            with Client(mesh.address) as client:
                return client.answer(question, FACTS.values(), shown=2, max_tokens=1)

        assert [one.id for one in (await asyncio.to_thread(plain)).cited] == ["0", "7"]


async def test_the_assistant_on_this_repositorys_own_documents(tmp_path: Path) -> None:
    """What README promises: 20 questions, the right passage among the first three for at least 16 of them; a follow-up
    finds most of its prompt in the cache; indexing again embeds nothing, and only what changed after a change."""
    note = tmp_path / "note.md"
    days = {"Monday": "rice", "Tuesday": "pasta", "Wednesday": "curry", "Friday": "soup"}
    lines = [f"# Cafeteria on {day}\n\nIn the cafeteria there is {dish} on {day}." for day, dish in days.items()]
    note.write_text("\n\n".join([*lines, "# Garage\n\nIt closes at ten."]))
    paths = [ROOT / "README.md", ROOT / "docs", note]

    run: Any = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}

    def live(address: str) -> None:
        with Client(address) as mesh:
            with Store(tmp_path / "store") as store:
                with pytest.raises(StoreError, match="nothing is indexed"):
                    store.search([0.0] * 384, 1)
                seen: list[tuple[int, int]] = []
                first = index(paths, store, mesh, MODEL, lambda *done: seen.append(done))
                assert first.embedded == first.passages > 50 and not first.skipped
                assert seen[0] == (0, first.passages) and seen[-1] == (first.passages, first.passages)
                words = ("ask", "who?", "--store", str(tmp_path / "store"), "--gateway", address)
                refused = subprocess.run([sys.executable, "-m", "examples.rag", *words], **run)
                assert refused.returncode == 1 and "another process" in refused.stderr, refused

                verdicts = list(evaluate(questions(), store, mesh, 3))
                missed = [f"{one.expected.question} -> {one.found}" for one in verdicts if not one.hit]
                assert len(verdicts) == 20 and len(missed) <= 4, "\n".join(missed)

                about = Assistant(store, mesh, document="0017-routing.md", max_tokens=3)
                list(about.ask("In what order do the waiting requests of a line go?"))
                (*_, last) = about.ask("And what did aging change?")
                assert {one.document for one in about.shown} == {f"{ROOT}/docs/decisions/0017-routing.md"}
                usage = last.so_far.usage
                assert usage.cached_tokens >= 0.8 * usage.prompt_tokens, usage

                assistant = Assistant(store, mesh, max_tokens=3)
                list(assistant.ask("What is there in the cafeteria on Friday?"))
                before = assistant.shown
                list(assistant.ask("And in the cafeteria on Monday?"))
                assert assistant.shown[: len(before)] == before
                (*_, last) = assistant.ask("Why are there two wheels, and what is in each?")
                assert not any(one.pinned for one in last.so_far.cited) and "0007" in str(assistant.shown)
            with Store(tmp_path / "store") as store:
                assert index(paths, store, mesh, MODEL, lambda *_: None).embedded == 0
                note.write_text("# Cafeteria\n\nOn Fridays there is stew.")
                changed = index(paths, store, mesh, MODEL, lambda *_: None)
                assert (changed.embedded, changed.passages) == (1, first.passages - 4)
                vector = mesh.embed("What is there on Fridays? When does the garage close?", model=MODEL)[0]
                found = [one.passage for one in store.search(vector, 5000)]
                assert len(found) == changed.passages
                (left,) = [one.text for one in found if one.document == note.as_posix()]
                assert "stew" in left
            told = subprocess.run([sys.executable, "-m", "examples.rag", *words, "--max-tokens", "2"], **run)
            assert told.returncode == 0 and told.stdout == " w0 w1\n" and "[5] " in told.stderr, told

    async with answering_mesh(tmp_path) as mesh:
        await asyncio.to_thread(live, mesh.address)
