"""The engine port: what the language model service asks of vLLM, an OpenAI-speaking server or the scripted engine.

An engine turns a request message into a stream of `Event`s. What is around it is the service's: range checks, identity,
coalescing, deadlines, status codes. An engine does what the request says or raises `MeshError(UNSUPPORTED)` naming the
field; it ignores nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Usage
from infermesh.v1.worker_pb2 import Load
from registry.endpoint import Capacity, Hardware, Speed


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is known of an engine once it has started; it goes into the registry's metadata."""

    engine: str
    engine_version: str
    model: str  # the model id it serves
    dtype: str = ""
    quantization: str = ""
    hardware: Hardware = Hardware()
    speed: Speed = Speed()
    capacity: Capacity = Capacity()
    features: frozenset[str] = frozenset()  # tools, reasoning, json_schema, regex, logprobs, token_ids, n …
    weights_version: str = ""  # equal weights have equal versions
    tokenizer_digest: str = ""
    template_digest: str = ""


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """What the first event tells of the prompt, in tokens."""

    tokens: int
    cached: int = 0
    logprobs: tuple[lm.PositionLogprobs, ...] = ()
    preempted: int = 0  # times that it was put aside; the service's word, not the engine's


@dataclass(slots=True)
class Event:
    """What one engine step produced. The first has `prompt`, the last has `usage`; no event repeats tokens."""

    deltas: list[lm.Delta] = field(default_factory=list)
    prompt: PromptFacts | None = None
    usage: Usage | None = None


Computed = Callable[[int], None]  # hears how many prompt tokens each step computed, from engines that know


def unheard(tokens: int) -> None:
    """Where nobody minds what a step computed."""


class Engine(Protocol):
    async def start(self, progress: Callable[[str], None]) -> EngineInfo:
        """Loads the model; `progress` takes lines for the operator.

        Raises:
            MeshError: FAILED_PRECONDITION with what is wrong and what to do (folder missing, model too large …).
        """
        ...

    def chat(self, request: lm.ChatRequest) -> AsyncIterator[Event]:
        """Closing the iterator (or cancelling its consumer) aborts the request in the engine and frees its KV blocks.
        `request.relay.rendered_at` is the time for the template, `relay.cache_salt` separates prefix caches,
        `relay.resume` is refused with UNSUPPORTED by engines that cannot replay.

        Raises:
            MeshError: INVALID_ARGUMENT, UNSUPPORTED, OUT_OF_RANGE or CONTEXT_LENGTH_EXCEEDED before the first event;
                INSTANCE_FULL when the engine's queue is full; ENGINE_FAILED when it broke.
        """
        ...

    def complete(self, request: lm.CompleteRequest) -> AsyncIterator[Event]:
        """The same for one prompt."""
        ...

    async def tokenize(self, request: lm.TokenizeRequest) -> lm.TokenizeResponse: ...

    async def detokenize(self, request: lm.DetokenizeRequest) -> lm.DetokenizeResponse: ...

    def load(self) -> Load:
        """A snapshot, without waiting; what is unknown stays unset."""
        ...

    async def died(self) -> str:
        """Returns, with the reason, only when the engine is dead beyond repair; the process then ends."""
        ...

    async def close(self) -> None:
        """Stops the engine and every process it started. Blocking work runs off the event loop."""
        ...
