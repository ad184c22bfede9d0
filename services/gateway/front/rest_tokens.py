"""POST /tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

from typing import Any

import orjson

from infermesh.errors import invalid
from infermesh.v1 import language_model_pb2 as lm
from services.gateway.front.fan_out import unary
from services.gateway.front.rest_body import read_body
from services.gateway.front.rest_exchange import Exchange
from services.gateway.front.rest_generation import json_text
from services.gateway.front.rest_inputs import token_ids
from services.gateway.front.rest_messages import add_messages, tools
from services.gateway.front.rest_schema import DetokenizeBody, TokenizeBody
from services.gateway.upstream.calls import Method

_NAMES = {"text": "prompt", "chat": "messages", "chat.messages": "messages", "token_ids": "tokens"}


async def tokenize(exchange: Exchange) -> None:
    body = await read_body(exchange, TokenizeBody)
    exchange.names = _NAMES
    answer, identity = await unary(exchange, Method.TOKENIZE, tokenize_request(body))
    reply: dict[str, Any] = {
        "count": len(answer.token_ids),
        "max_model_len": answer.max_context,
        "tokens": list(answer.token_ids),
    }
    if body.return_token_strs:
        reply["token_strs"] = list(answer.tokens)
    await exchange.respond(orjson.dumps(reply), identity)


def tokenize_request(body: TokenizeBody) -> lm.TokenizeRequest:
    """Raises MeshError: INVALID_ARGUMENT."""
    request = lm.TokenizeRequest(model=body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "give either prompt or messages")
    if body.messages is None:
        for name in ("tools", "chat_template_kwargs", "add_generation_prompt"):
            if getattr(body, name) is not None:
                raise invalid(name, "needs messages")
        request.text = body.prompt or ""
        if body.add_special_tokens is not None:
            request.add_special_tokens = body.add_special_tokens
        return request
    if not body.messages:
        raise invalid("messages", "at least one message is needed")
    if body.add_special_tokens:
        raise invalid("add_special_tokens", "is for a prompt; the chat template sets those of a conversation")
    add_messages(request.chat.messages, body.messages)
    request.chat.tools.extend(tools(body.tools))
    if body.chat_template_kwargs:
        request.chat.template_args_json = json_text("chat_template_kwargs", body.chat_template_kwargs)
    if body.add_generation_prompt is not None:
        request.chat.add_generation_prompt = body.add_generation_prompt
    return request


async def detokenize(exchange: Exchange) -> None:
    body = await read_body(exchange, DetokenizeBody)
    exchange.names = _NAMES
    request = lm.DetokenizeRequest(model=body.model)
    request.token_ids.extend((await token_ids("tokens", body.tokens)).ids)
    answer, identity = await unary(exchange, Method.DETOKENIZE, request)
    await exchange.respond(orjson.dumps({"prompt": answer.text}), identity)
