"""The messages between a front and the forwarder (law 6: two fronts, one path).

A front parses and checks, builds the contract's own request message and a `Call`, and opens it:

    async with forwarder.open(Method.CHAT, request, call) as reply:
        reply.identity          # who answers: known as soon as the first event is here
        async for event in reply:
            event.raw           # the bytes as the instance sent them
            event.message       # the same, decoded once

Entering waits for the first event (the first token, or the whole answer of a unary method) and raises `MeshError` when
there will be none. Leaving early cancels the work in the engine. A unary method gives exactly one event.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from infermesh.errors import MeshError
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import rerank_pb2 as rr
from services.gateway.entrance import Entrance


class Method(Enum):
    """What can be forwarded: kind of instance, full gRPC path, request and response type, whether it streams."""

    CHAT = ("llm", "/infermesh.v1.LanguageModelService/Chat", lm.ChatRequest, lm.ChatResponse, True)
    COMPLETE = ("llm", "/infermesh.v1.LanguageModelService/Complete", lm.CompleteRequest, lm.CompleteResponse, True)
    TOKENIZE = ("llm", "/infermesh.v1.LanguageModelService/Tokenize", lm.TokenizeRequest, lm.TokenizeResponse, False)
    DETOKENIZE = (
        "llm",
        "/infermesh.v1.LanguageModelService/Detokenize",
        lm.DetokenizeRequest,
        lm.DetokenizeResponse,
        False,
    )
    EMBED = ("embedding", "/infermesh.v1.EmbeddingService/Embed", em.EmbedRequest, em.EmbedResponse, False)
    RERANK = ("rerank", "/infermesh.v1.RerankService/Rerank", rr.RerankRequest, rr.RerankResponse, False)

    def __init__(self, kind: str, path: str, request: Any, response: Any, streams: bool) -> None:
        self.kind = kind
        self.path = path
        self.request = request
        self.response = response
        self.streams = streams


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is; from the API key, never from a header."""

    tenant: str = "default"
    klass: str = "standard"  # core | standard | bulk: non-core traffic yields first
    models: tuple[str, ...] = ()  # empty = all
    operator: bool = False
    tokens_per_minute: int = 0  # 0 = unbounded


@dataclass(frozen=True, slots=True)
class Call:
    """The circumstances of one request. `deadline` is on the event loop's clock, None = the gateway's default.
    `entrance`: where it came in; None = it is a part of another one.

    `collected`: the caller gets the whole answer or none, so that one that was lost half-way may begin anew elsewhere.
    """

    request_id: str
    caller: Caller = Caller()
    deadline: float | None = None
    trace: Mapping[str, str] = field(default_factory=dict)  # traceparent, tracestate
    collected: bool = False
    entrance: Entrance | None = None

    @property
    def trace_id(self) -> str:
        """Of the caller's trace; empty = it brought none."""
        return self.trace.get("traceparent", "--").split("-")[1]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who answers: the last one, once others had to go on. `degraded`: the model asked for, when another one served it.
    `resumes`: how often a stream went on elsewhere; `exact`: the whole is what one instance would have answered.
    `told`: both ids as callers may see them, where that differs."""

    instance_id: str
    model_id: str
    attempts: int = 1
    degraded: str = ""
    resumes: int = 0
    exact: bool = True
    told: tuple[str, str] | None = None

    @property
    def shown(self) -> tuple[str, str]:
        """Instance and model id for the caller; empty = hidden."""
        return (self.instance_id, self.model_id) if self.told is None else self.told


@dataclass(slots=True)
class Event:
    raw: bytes
    message: Any


class Reply(Protocol):
    identity: Identity

    def __aiter__(self) -> AsyncIterator[Event]: ...


class Forward(Protocol):
    """What a front asks of the forwarder."""

    def open(self, method: Method, request: Any, call: Call) -> AbstractAsyncContextManager[Reply]:
        """Checks the request (ranges, `relay` unset), the caller's right to the model and its tokens a minute, then
        finds an instance. The message belongs to the forwarder from then on. Fronts need not repeat these checks."""
        ...


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model id that clients may name. `context_max` in tokens, 0 = unknown; `created` in unix seconds. `variants`: of
    a weighted alias, the models behind it by weight."""

    id: str
    kind: str
    aliases: tuple[str, ...] = ()
    context_max: int = 0
    created: int = 0
    variants: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One line of `instances`. `running`, `waiting`, `kv_used_ratio` are its own last report, None = unknown.

    `in_flight` is what this gateway has there. `state`: a word of
    routing.health.State, or `rejected`; `why` and `since_s` (seconds) belong to it.
    """

    id: str
    kind: str
    model: str
    address: str
    state: str
    tier: str = ""
    device: str = ""
    running: int | None = None
    waiting: int | None = None
    kv_used_ratio: float | None = None
    speed: Mapping[str, float | str] = field(default_factory=dict)  # the known numbers of `Speed`, and `source`
    weight: float = 1.0
    rejected_reason: str = ""
    incarnation: int = 0
    in_flight: int = 0
    aliases: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    since_s: float = 0.0


class DirectoryView(Protocol):
    """What a front may see of the fleet. Both lists are sorted by id."""

    def models(self) -> list[ModelView]: ...

    def instances(self) -> list[InstanceView]: ...

    @property
    def aliases(self) -> Mapping[str, tuple[tuple[str, float], ...]]:
        """Weighted aliases: name -> (model, weight)."""
        ...

    @property
    def healthy(self) -> int:
        """How many instances take work."""
        ...

    @property
    def stale(self) -> bool:
        """The registry is out of reach; this is the last known set."""
        ...


class Root(Protocol):
    @property
    def headers(self) -> dict[str, str]:
        """The trace context for what is below it."""
        ...

    def ended(self, outcome: str, took_s: float = 0.0) -> None: ...


class Watcher(Protocol):
    """What a front tells of requests that never reach the forwarder, and where /metrics comes from. The forwarder
    itself counts and logs every request that was opened."""

    def refused(self, method: str, error: MeshError, call: Call, took_s: float = 0.0) -> None:
        """`took_s`: how long ago it came in."""
        ...

    def root(self, call: Call) -> Root | None:
        """The server span of a request that the forwarder does not serve as it is; None while spans are not kept."""
        ...

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and their content type."""
        ...
