"""Cohere's own SDK, unmodified, against a whole mesh."""

from __future__ import annotations

import cohere
import httpx
import pytest
from cohere.core.api_error import ApiError

from tests.kit.processes import KEY

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
QUESTION = "How long does the battery of the headphones last?"
DOCUMENTS = [
    "The parliament passed the tax bill on Thursday.",
    "Bake the bread at 220 degrees for forty minutes.",
    "On a full charge they play music for about thirty hours.",
    "Glaciers move a few metres a year.",
]


@pytest.fixture
def client(served):
    with httpx.Client() as transport:
        yield cohere.ClientV2(api_key=KEY, base_url=served.url, httpx_client=transport)


def test_rerank(client, served):
    reply = client.rerank(model=_reranker(served), query=QUESTION, documents=DOCUMENTS, top_n=2)
    assert [result.index for result in reply.results][:1] == [2] and len(reply.results) == 2
    assert reply.results[0].relevance_score > reply.results[1].relevance_score
    assert reply.meta.billed_units.search_units == 1 and reply.id


def test_errors(client, served):
    with pytest.raises(cohere.NotFoundError):
        client.rerank(model="nope", query="q", documents=["a"])
    with pytest.raises(ApiError) as empty:
        client.rerank(model=_reranker(served), query="q", documents=[])
    assert empty.value.status_code == 400
    with httpx.Client() as transport, pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2(api_key="wrong", base_url=served.url, httpx_client=transport).rerank(
            model="nope", query="q", documents=["a"]
        )


def _reranker(served):
    listed = httpx.get(f"{served.url}/v1/models", headers={"authorization": f"Bearer {KEY}"}).json()
    return next(entry["id"] for entry in listed["data"] if entry["kind"] == "rerank")
