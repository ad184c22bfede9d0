"""Going on with an answer where only its text can be told: an adopted server takes no token ids. Pure.

The delivered text becomes the beginning of the assistant's message (or of the prompt), and the server continues it.
That is not a replay: the text is tokenised anew, penalties and seeds begin anew, and the tokens whose text was still
held back (the beginning of a stop string, part of a character) are drawn again. So the ids of the continuation are not
told, and gateways call it inexact.
"""

from __future__ import annotations

from typing import TypeVar

from infermesh.errors import unsupported
from infermesh.v1 import language_model_pb2 as lm
from services.llm.engines.openai_wire import Upstream

Request = TypeVar("Request", lm.ChatRequest, lm.CompleteRequest)


def check(request: lm.ChatRequest | lm.CompleteRequest, upstream: Upstream) -> None:
    """
    Raises:
        MeshError: UNSUPPORTED, with what stands in the way.
    """
    if not request.relay.resume.text:
        raise unsupported("relay.resume.text", "an adopted server continues text, and none is given")
    if isinstance(request, lm.ChatRequest):
        upstream.needs("continue_final", "relay.resume")
    elif request.WhichOneof("prompt") == "token_ids":
        raise unsupported("relay.resume", "an adopted server cannot continue a prompt of token ids")


def continued(request: Request, done: int) -> Request:
    """The request for the rest, after `done` tokens."""
    rest = type(request)()
    rest.CopyFrom(request)
    text = request.relay.resume.text
    rest.relay.ClearField("resume")
    rest.delivery.token_ids = False
    if rest.sampling.HasField("max_tokens"):
        rest.sampling.max_tokens = max(0, rest.sampling.max_tokens - done)
    if rest.sampling.min_tokens:
        rest.sampling.min_tokens = max(0, rest.sampling.min_tokens - done)
    if isinstance(rest, lm.CompleteRequest):
        rest.text += text
        rest.echo = False
    elif rest.continue_final_message:
        last = rest.messages[-1]
        if last.parts:
            last.parts.add(text=text)
        else:
            last.content += text
    else:
        rest.messages.add(role=lm.ROLE_ASSISTANT, content=text)
        rest.continue_final_message = True
        rest.ClearField("add_generation_prompt")
    return rest
