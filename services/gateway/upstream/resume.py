"""May a stream that was lost go on elsewhere, where, and is the continuation the one it would have had? Pure.

A resumed stream is replayed: the next instance feeds the delivered ids through detokenizer, stop matcher and parsers
with output off, and goes on from there. What depends on more than (request, ids) is refused, or told as inexact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from infermesh.v1 import language_model_pb2 as lm
from registry.endpoint import Endpoint
from services.gateway.routing.facts import Facts, Likeness, machine
from services.gateway.upstream.calls import Method
from services.gateway.upstream.transcript import Transcript

FEATURE = "resume"  # of instances that can
PRIORITY = 101  # beyond what callers may ask for: somebody is reading along
ADOPTED = "openai-http"  # engines that continue a text instead of replaying ids


def refused(method: Method, request: Any) -> str:
    """Why no answer to this request could be resumed; empty if it can."""
    if method not in (Method.CHAT, Method.COMPLETE):
        return "only chat and completion are resumed"
    sampling = request.sampling
    if sampling.n > 1:
        return "more than one choice was asked for"
    if sampling.HasField("prompt_logprobs"):
        return "prompt_logprobs were asked for"
    if request.HasField("constraint") and request.constraint.WhichOneof("constraint") is not None:
        return "a grammar is in progress"
    if method is Method.CHAT and request.tools:
        forced = (lm.ToolChoice.MODE_REQUIRED, lm.ToolChoice.MODE_FUNCTION)
        if request.tool_choice.mode in forced:
            return "a forced tool call is in progress, which has a grammar"
    return ""


def refused_now(request: Any, origin: Endpoint, transcript: Transcript) -> str:
    """Why this answer cannot be resumed as it stands; empty if it can."""
    if origin.features and FEATURE not in origin.features:
        return f"instance {origin.id} does not tell what it takes to go on elsewhere"
    if adopted(origin):
        if transcript.called or transcript.reasoned:
            return "tool calls and reasoning cannot be continued as text"
        return "" if transcript.text else "nothing of its text is known"
    if not origin.weights_version or not origin.tokenizer_digest:
        return f"instance {origin.id} has not told its weights_version and tokenizer_digest"
    if transcript.called and any(tool.strict for tool in request.tools):
        return "a strict tool call is in progress, which has a grammar"
    return "" if transcript.ids else "its token ids are not known"


def promised(request: Any, transcript: Transcript) -> bool:
    """Does an instance of the same kind continue exactly as this one would have?"""
    sampling = request.sampling
    draws = not sampling.HasField("temperature") or sampling.temperature > 0
    if sampling.HasField("seed") and draws:
        return False  # its random numbers begin anew
    if sampling.presence_penalty or sampling.frequency_penalty:
        return False  # they count the answer, which is a prompt there
    return not transcript.called  # the grammar of a call's arguments begins anew with the next call


def exact(request: Any, transcript: Transcript, origin: Endpoint, successor: Endpoint) -> bool:
    """Equal numbers need equal machines, too."""
    return not adopted(origin) and promised(request, transcript) and alike(origin, strict=True).fits(successor)


def alike(origin: Endpoint, *, strict: bool) -> Likeness:
    """Who may go on with an answer of `origin`; `strict`: who computes the very same numbers."""
    return Likeness(
        model=origin.model,
        weights_version=origin.weights_version,
        tokenizer_digest=origin.tokenizer_digest,
        template_digest=origin.template_digest,
        engine=origin.engine if adopted(origin) or strict else "",
        machine=machine(origin) if strict else (),
    )


def adopted(endpoint: Endpoint) -> bool:
    return endpoint.engine.startswith(ADOPTED)


def facts(base: Facts, origin: Endpoint, transcript: Transcript, now: float, *, strict: bool) -> Facts:
    """The request as routing is to see it now: a longer prompt, a shorter answer, before those who have nothing yet."""
    done = transcript.tokens
    told = transcript.started.prompt_tokens if transcript.started is not None else 0
    prompt = told or base.prompt_tokens
    return replace(
        base,
        model=origin.model,
        prompt_tokens=prompt + done if prompt else 0,
        counted=prompt > 0,
        max_tokens=max(1, base.max_tokens - done) if base.max_tokens else 0,
        chain_share=base.chain_share * prompt / (prompt + done) if prompt else base.chain_share,
        features=base.features | {FEATURE},
        priority=PRIORITY,
        since=now,
        degrade=False,
        alike=alike(origin, strict=strict),
    )
