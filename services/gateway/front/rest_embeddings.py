"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
from binascii import b2a_base64
from collections.abc import Iterator

import numpy as np
import orjson

from infermesh.errors import invalid
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import inference_pb2 as inf
from services.gateway.front.fan_out import unary
from services.gateway.front.rest_body import read_body
from services.gateway.front.rest_exchange import JSON, Exchange
from services.gateway.front.rest_inputs import inputs
from services.gateway.front.rest_schema import EmbeddingBody
from services.gateway.upstream.calls import Identity, Method

MAX_INPUTS = 2048
PIECE = 1 << 16  # bytes of JSON written in one step: about 6 vectors of 1,024 floats, 0.15 ms
_NAMES = {
    "texts": "input",
    "token_ids": "input",
    "max_tokens": "truncate_prompt_tokens",
    "hints.document_id": "x-infermesh-document-id",
    "hints.session_id": "session_id",
    "hints.priority": "priority",
}


async def embeddings(exchange: Exchange) -> None:
    body = await read_body(exchange, EmbeddingBody)
    exchange.names = _NAMES | ({"task": "prompt_name"} if body.prompt_name is not None else {})
    request = await embed_request(body)
    await exchange.breathe()
    exchange.hint(request.hints)
    answer, identity = await unary(exchange, Method.EMBED, request)
    await _write(exchange, answer, identity, base64=body.encoding_format == "base64")


async def embed_request(body: EmbeddingBody) -> em.EmbedRequest:
    """The contract's message.

    Raises:
        MeshError: INVALID_ARGUMENT, with the REST name.
    """
    request = em.EmbedRequest(model=body.model, dimensions=body.dimensions or 0, prefix=body.prefix or "")
    for item in await inputs("input", body.input, MAX_INPUTS):
        if isinstance(item, str):
            request.texts.append(item)
        else:
            request.token_ids.append(item)
    if body.dimensions == 0:
        raise invalid("dimensions", "must be at least 1")
    if body.normalize is not None:
        request.normalize = body.normalize
    if body.task is not None and body.prompt_name is not None and body.task != body.prompt_name:
        raise invalid("prompt_name", "contradicts task")
    request.task = body.task or body.prompt_name or ""
    request.truncation, request.max_tokens = truncation(body.truncate_prompt_tokens)
    if body.truncation_side == "left":
        request.truncation = em.TRUNCATION_START
    if body.session_id:
        request.hints.session_id = body.session_id
    if body.priority:
        request.hints.priority = -body.priority
    return request


def truncation(tokens: int | None) -> tuple[em.Truncation.ValueType, int]:
    """vLLM's `truncate_prompt_tokens`: -1 is the model's own limit.

    Raises:
        MeshError: INVALID_ARGUMENT.
    """
    if tokens is None:
        return em.TRUNCATION_UNSPECIFIED, 0
    if tokens == -1:
        return em.TRUNCATION_END, 0
    if tokens < 1:
        raise invalid("truncate_prompt_tokens", "must be -1 (the model's own limit) or at least 1")
    return em.TRUNCATION_END, tokens


async def _write(exchange: Exchange, answer: em.EmbedResponse, identity: Identity, *, base64: bool) -> None:
    """Vector by vector: 2,048 of 1,024 floats are 20 MB of JSON, which in one step would hold the loop for 60 ms."""
    pieces = _pieces(answer, base64=base64, model=answer.model or identity.model_id)
    first = next(pieces)
    second = next(pieces, None)
    if second is None:
        await exchange.respond(first, identity)
        return
    await exchange.start(200, [JSON, *exchange.reply_headers(identity)])
    for piece in (first, second):
        await exchange.send({"type": "http.response.body", "body": piece, "more_body": True})
    for piece in pieces:
        await exchange.send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0)
    await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})


def _pieces(answer: em.EmbedResponse, *, base64: bool, model: str) -> Iterator[bytes]:
    parts = [b'{"object":"list","data":[']
    size = 0
    for index, vector in enumerate(answer.vectors):
        packed = vector.packed
        if base64:
            value = b'"' + b2a_base64(packed, newline=False) + b'"'
        else:
            # Shortest text that reads back as the same float32, which is half as long as that of a float64.
            value = orjson.dumps(np.frombuffer(packed, "<f4"), option=orjson.OPT_SERIALIZE_NUMPY)
        parts.append(b'%b{"object":"embedding","index":%d,"embedding":%b}' % (b"," if index else b"", index, value))
        size += len(value)
        if size >= PIECE:
            yield b"".join(parts)
            parts.clear()
            size = 0
    tail = {"model": model, "usage": tokens_usage(answer.usage)}
    parts.append(b"]," + orjson.dumps(tail)[1:])
    yield b"".join(parts)


def tokens_usage(usage: inf.Usage) -> dict[str, int]:
    """Usage of what generates nothing."""
    return {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
