"""POST /v1/rerank (Jina's shape), /v2/rerank (Cohere's) and /v1/score (vLLM's)."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

import orjson

from infermesh.errors import invalid, unsupported
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import rerank_pb2 as rr
from services.gateway.front.disconnect import Attended
from services.gateway.front.fan_out import events, unary
from services.gateway.front.reply_parts import add_usage
from services.gateway.front.rest_body import read_body
from services.gateway.front.rest_embeddings import tokens_usage, truncation
from services.gateway.front.rest_exchange import Exchange
from services.gateway.front.rest_schema import RerankBody, ScoreBody
from services.gateway.upstream.calls import Method

DOCUMENTS_A_UNIT = 100  # what Cohere bills as one search
_NAMES = {
    "max_tokens_per_document": "max_tokens_per_doc",
    "hints.document_id": "x-infermesh-document-id",
    "hints.session_id": "x-infermesh-session-id",
    "hints.priority": "priority",
}
_PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


async def rerank(exchange: Exchange) -> None:
    """Both shapes: Cohere's differs by `meta`, which Jina's callers do not look at."""
    body = await read_body(exchange, RerankBody)
    exchange.names = _NAMES
    if body.top_n == 0:
        raise invalid("top_n", "must be at least 1")
    request = _request(body, body.query, body.documents)
    request.top_n = body.top_n or 0
    request.return_documents = body.return_documents
    exchange.hint(request.hints)
    answer, identity = await unary(exchange, Method.RERANK, request)
    results = []
    for ranked in answer.results:
        result: dict[str, Any] = {"index": ranked.index, "relevance_score": ranked.score}
        if body.return_documents:
            result["document"] = {"text": ranked.document or body.documents[ranked.index]}
        results.append(result)
    units = -(-len(body.documents) // DOCUMENTS_A_UNIT)
    reply = {
        "id": f"rerank-{exchange.request_id}",
        "model": answer.model or identity.model_id,
        "results": results,
        "usage": tokens_usage(answer.usage),
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": units}},
    }
    await exchange.respond(orjson.dumps(reply), identity)


async def score(exchange: Exchange) -> None:
    body = await read_body(exchange, ScoreBody)
    left, right = _sides(body)
    first, second = getattr(body, left), getattr(body, right)
    exchange.names = _NAMES | {"query": left, "documents": right}
    if len(first) == 1:
        requests = [_request(body, first[0], second)]
    elif len(first) == len(second):
        requests = [_request(body, query, [document]) for query, document in zip(first, second, strict=True)]
    else:
        raise invalid(right, f"{len(second)} entries for {len(first)} of {left}; give one {left}, or as many of each")
    for request in requests:
        exchange.hint(request.hints)
    scores = [0.0] * len(second)
    usage = inf.Usage()
    identity = None
    model = ""
    with Attended(exchange.receive):
        async with aclosing(events(exchange, Method.RERANK, requests, exchange.call())) as answers:
            async for index, who, answer in answers:
                identity = identity or who
                model = model or answer.model
                add_usage(usage, answer.usage)
                for ranked in answer.results:
                    scores[index + ranked.index] = ranked.score
    reply = {
        "id": f"score-{exchange.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)],
        "usage": tokens_usage(usage),
    }
    await exchange.respond(orjson.dumps(reply), identity)


def _sides(body: ScoreBody) -> tuple[str, str]:
    given = {name for pair in _PAIRS for name in pair if getattr(body, name) is not None}
    for left, right in _PAIRS:
        if given == {left, right}:
            for name in (left, right):
                if not getattr(body, name):
                    raise invalid(name, "must not be empty")
            return left, right
    raise invalid("text_1", "give text_1 and text_2, queries and documents, or data_1 and data_2")


def _request(body: RerankBody | ScoreBody, query: str, documents: list[str]) -> rr.RerankRequest:
    request = rr.RerankRequest(
        model=body.model,
        query=query,
        documents=documents,
        max_tokens_per_document=body.max_tokens_per_doc or 0,
        # An activation squeezes the scorer's numbers into 0 .. 1; without it they are raw.
        raw_scores=bool(body.raw_scores) or body.use_activation is False,
    )
    if body.truncate_prompt_tokens not in (None, -1):
        raise unsupported("truncate_prompt_tokens", "must be -1 (the model's own limit) here; use max_tokens_per_doc")
    request.truncation, _ = truncation(body.truncate_prompt_tokens)
    if body.priority:
        request.hints.priority = -body.priority
    return request
