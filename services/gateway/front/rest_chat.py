"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from infermesh.errors import invalid
from infermesh.v1 import language_model_pb2 as lm
from services.gateway.front.chat_reply import ChatChunks, ChatCollected, ChatOptions
from services.gateway.front.disconnect import Attended
from services.gateway.front.rest_body import read_body
from services.gateway.front.rest_exchange import Exchange
from services.gateway.front.rest_generation import NAMES, constraint, delivery, hints, json_text, sampling
from services.gateway.front.rest_messages import add_messages, tool_choice, tools
from services.gateway.front.rest_schema import ChatBody
from services.gateway.front.sse import DONE, EventStream, trailer
from services.gateway.upstream.calls import Call, Method


async def chat(exchange: Exchange) -> None:
    body = await read_body(exchange, ChatBody)
    request, names = chat_request(body)
    await exchange.breathe()
    exchange.names = names
    exchange.hint(request.hints)
    options = ChatOptions(
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        token_ids=bool(body.return_token_ids),
        reasoning=body.include_reasoning,
    )
    call = exchange.call(streamed=body.stream)
    if body.stream:
        await _stream(exchange, request, call, options)
    else:
        await _collect(exchange, request, call, options)


def chat_request(body: ChatBody) -> tuple[lm.ChatRequest, dict[str, str]]:
    """The contract's message, and what its fields are called on this side.

    Raises:
        MeshError: INVALID_ARGUMENT or UNSUPPORTED, with the REST name.
    """
    names = dict(NAMES)
    request = lm.ChatRequest(
        model=body.model,
        sampling=_sampling(body, names),
        constraint=constraint(body, names),
        tools=tools(body.tools),
        tool_choice=tool_choice(body.tool_choice, body.parallel_tool_calls),
        delivery=delivery(body),
        lora=body.lora or "",
        continue_final_message=bool(body.continue_final_message),
    )
    add_messages(request.messages, body.messages)
    hints(body, request.hints)
    if body.add_generation_prompt is not None and not (body.add_generation_prompt and body.continue_final_message):
        request.add_generation_prompt = body.add_generation_prompt
    if arguments := _template_arguments(body):
        request.template_args_json = json_text("chat_template_kwargs", arguments)
        names["template_args_json"] = "chat_template_kwargs" if body.chat_template_kwargs else "reasoning_effort"
    for index in range(len(request.tools)):
        for field in ("name", "parameters"):
            names[f"tools[{index}].{field}"] = f"tools[{index}].function.{field}"
    for index, message in enumerate(request.messages):
        for call in range(len(message.tool_calls)):
            path = f"messages[{index}].tool_calls[{call}]"
            names[f"{path}.arguments"] = f"{path}.function.arguments"
    return request, names


def _sampling(body: ChatBody, names: dict[str, str]) -> lm.Sampling:
    made = sampling(body)
    if body.max_completion_tokens is not None:
        if body.max_tokens is not None and body.max_tokens != body.max_completion_tokens:
            raise invalid("max_tokens", "contradicts max_completion_tokens")
        made.max_tokens = body.max_completion_tokens
        names["sampling.max_tokens"] = "max_completion_tokens"
    if body.logprobs:
        made.logprobs = body.top_logprobs or 0
        names["sampling.logprobs"] = "top_logprobs"
    elif body.top_logprobs:
        raise invalid("top_logprobs", "needs logprobs: true")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "is not served in a stream")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs stream: true")
    return made


def _template_arguments(body: ChatBody) -> dict[str, Any]:
    """Reasoning effort is an argument of the template, in the models that know it."""
    arguments = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            arguments.setdefault("enable_thinking", False)
    return arguments


async def _stream(exchange: Exchange, request: lm.ChatRequest, call: Call, options: ChatOptions) -> None:
    events = EventStream(exchange)
    usage = None
    try:
        with Attended(exchange.receive):
            async with exchange.open(Method.CHAT, request, call) as reply:
                chunks: ChatChunks | None = None
                async for event in reply:
                    message = event.message
                    if chunks is None:
                        started = message.started
                        chunks = ChatChunks(options, started, reply.identity.model_id, f"chatcmpl-{call.request_id}")
                        await events.start(reply.identity)
                    data = chunks.render(message)
                    if data:
                        await events.write(data)
                    if message.HasField("usage"):
                        usage = message.usage
        assert chunks is not None
        await events.end(chunks.last(usage) + trailer(reply.identity) + DONE)
    finally:
        events.stop()


async def _collect(exchange: Exchange, request: lm.ChatRequest, call: Call, options: ChatOptions) -> None:
    collected = ChatCollected(options)
    with Attended(exchange.receive):
        async with exchange.open(Method.CHAT, request, replace(call, collected=True)) as reply:
            async for event in reply:
                collected.add(event.message)
            identity = reply.identity
    body = collected.reply(identity.model_id, f"chatcmpl-{call.request_id}")
    await exchange.respond(orjson.dumps(body), identity)
