"""POST /v1/completions."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

import orjson

from infermesh.errors import invalid
from infermesh.v1 import language_model_pb2 as lm
from services.gateway.front.completion_reply import CompletionChunks, CompletionCollected, CompletionOptions
from services.gateway.front.disconnect import Attended
from services.gateway.front.fan_out import events
from services.gateway.front.rest_body import read_body
from services.gateway.front.rest_exchange import Exchange
from services.gateway.front.rest_generation import NAMES, constraint, delivery, hints, sampling
from services.gateway.front.rest_inputs import Input, inputs
from services.gateway.front.rest_schema import CompletionBody
from services.gateway.front.sse import DONE, EventStream, trailer
from services.gateway.upstream.calls import Call, Method

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this endpoint only


async def completions(exchange: Exchange) -> None:
    body = await read_body(exchange, CompletionBody)
    prompts = await inputs("prompt", body.prompt, MAX_PROMPTS)
    template, names = completion_request(body)
    exchange.names = names
    exchange.hint(template.hints)
    requests = [_with_prompt(template, prompt) for prompt in prompts]
    await exchange.breathe()
    options = CompletionOptions(
        n=body.n or 1,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        logprobs=body.logprobs,
        token_ids=bool(body.return_token_ids),
        echo=bool(body.echo),
        prompts=tuple(prompt if isinstance(prompt, str) else "" for prompt in prompts),
    )
    call = exchange.call(streamed=body.stream)
    if body.stream:
        await _stream(exchange, requests, call, options)
    else:
        await _collect(exchange, requests, call, options)


def completion_request(body: CompletionBody) -> tuple[lm.CompleteRequest, dict[str, str]]:
    """The contract's message without its prompt, and what its fields are called on this side.

    Raises:
        MeshError: INVALID_ARGUMENT or UNSUPPORTED, with the REST name.
    """
    names = dict(NAMES)
    request = lm.CompleteRequest(
        model=body.model,
        sampling=sampling(body),
        constraint=constraint(body, names),
        echo=bool(body.echo),
        delivery=delivery(body),
        lora=body.lora or "",
        suffix=body.suffix or "",
    )
    hints(body, request.hints)
    if body.max_tokens is None:
        request.sampling.max_tokens = DEFAULT_MAX_TOKENS
    if body.logprobs is not None:
        request.sampling.logprobs = body.logprobs
        if body.echo:
            request.sampling.prompt_logprobs = body.logprobs
            names["sampling.prompt_logprobs"] = "logprobs"
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "is not served in a stream")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs stream: true")
    return request, names


def _with_prompt(template: lm.CompleteRequest, prompt: Input) -> lm.CompleteRequest:
    request = lm.CompleteRequest()
    request.CopyFrom(template)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.CopyFrom(prompt)
    return request


async def _stream(
    exchange: Exchange, requests: list[lm.CompleteRequest], call: Call, options: CompletionOptions
) -> None:
    stream = EventStream(exchange)
    chunks = CompletionChunks(options)
    begun, end = False, b""
    try:
        with Attended(exchange.receive):
            async with aclosing(events(exchange, Method.COMPLETE, requests, call)) as happenings:
                async for prompt, identity, message in happenings:
                    if not begun:
                        begun = True
                        chunks.begin(prompt, message, identity.model_id, f"cmpl-{call.request_id}")
                        await stream.start(identity)
                    data = chunks.render(prompt, message)
                    if data:
                        await stream.write(data)
                    end = trailer(identity) or end
        await stream.end(chunks.last() + end + DONE)
    finally:
        stream.stop()


async def _collect(
    exchange: Exchange, requests: list[lm.CompleteRequest], call: Call, options: CompletionOptions
) -> None:
    collected = CompletionCollected(options)
    first = None
    call = replace(call, collected=True)
    with Attended(exchange.receive):
        async with aclosing(events(exchange, Method.COMPLETE, requests, call)) as happenings:
            async for prompt, identity, message in happenings:
                first = first or identity
                collected.add(prompt, message)
    assert first is not None
    body = collected.reply(first.model_id, f"cmpl-{call.request_id}")
    await exchange.respond(orjson.dumps(body), first)
