"""LanguageModelService over the engine port: who may ask, what is in range, identity, coalescing, usage once."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc
from infermesh.v1.inference_pb2 import Relay
from registry.endpoint import Endpoint
from services.chassis import checks
from services.chassis.admittance import admit
from services.chassis.arrivals import Arrivals
from services.chassis.identity import Identity, announce
from services.chassis.keys import Keys
from services.chassis.rpc import Context, stream, unary
from services.llm.delivery import Coalescer
from services.llm.engine import Engine, Event, PromptFacts
from services.llm.in_turn import in_turn, next_event
from services.llm.window import PROMPT_TOKENS_KEY, OutOfWindow

SERVICE = "infermesh.v1.LanguageModelService"
DEFAULT_MAX_RUNNING = 256  # where nobody knows better
RETRY_AFTER_S = 0.5
MAX_DETOKENIZE_IDS = 1 << 20

Generation = lm.ChatRequest | lm.CompleteRequest
Request = TypeVar("Request", lm.ChatRequest, lm.CompleteRequest)
Response = TypeVar("Response", lm.ChatResponse, lm.CompleteResponse)


class LanguageModelService(language_model_pb2_grpc.LanguageModelServiceServicer):
    """`serve` tells it what is served once the engine has started; the chassis lets no call in before."""

    def __init__(
        self, engine: Engine, identity: Identity, arrivals: Arrivals, keys: Keys, max_waiting: int | None = None
    ) -> None:
        self._engine = engine
        self._identity = identity
        self._arrivals = arrivals
        self._keys = keys
        self._max_waiting = max_waiting
        self._names: frozenset[str] = frozenset()
        self._room = 0

    def serve(self, endpoint: Endpoint) -> None:
        """The names that are answered to, and the bound of what may be in flight: the batch and a small queue, so that
        the engine is never empty and what cannot start soon waits where it can still go elsewhere.
        """
        self._names = frozenset((endpoint.model, *endpoint.aliases))
        running = endpoint.capacity.max_running or DEFAULT_MAX_RUNNING
        waiting = max(8, running // 4) if self._max_waiting is None else self._max_waiting
        self._room = running + waiting

    @stream
    def Chat(self, request: lm.ChatRequest, context: Context) -> AsyncIterator[lm.ChatResponse]:
        return self._generate(request, context, checks.check_chat, self._engine.chat, lm.ChatResponse, "chatcmpl-")

    @stream
    def Complete(self, request: lm.CompleteRequest, context: Context) -> AsyncIterator[lm.CompleteResponse]:
        return self._generate(
            request, context, checks.check_complete, self._engine.complete, lm.CompleteResponse, "cmpl-"
        )

    @unary
    async def Tokenize(self, request: lm.TokenizeRequest, context: Context) -> lm.TokenizeResponse:
        relay = admit(request, context, self._keys, self._names)
        which = request.WhichOneof("input")
        if which is None:
            raise invalid("input", "give either text or chat")
        if which == "chat":
            chat = request.chat
            checks.check_chat(
                lm.ChatRequest(messages=chat.messages, tools=chat.tools, template_args_json=chat.template_args_json)
            )
        with self._arrivals.enter(relay):
            reply = await self._engine.tokenize(request)
        reply.model = self._identity.model
        await announce(context, self._identity)
        return reply

    @unary
    async def Detokenize(self, request: lm.DetokenizeRequest, context: Context) -> lm.DetokenizeResponse:
        relay = admit(request, context, self._keys, self._names)
        if len(request.token_ids) > MAX_DETOKENIZE_IDS:
            raise invalid("token_ids", f"{len(request.token_ids)} entries, at most {MAX_DETOKENIZE_IDS}")
        with self._arrivals.enter(relay):
            reply = await self._engine.detokenize(request)
        reply.model = self._identity.model
        await announce(context, self._identity)
        return reply

    async def _generate(
        self,
        request: Request,
        context: Context,
        check: Callable[[Request], None],
        run: Callable[[Request], AsyncIterator[Event]],
        response: type[Response],
        prefix: str,
    ) -> AsyncIterator[Response]:
        relay = admit(request, context, self._keys, self._names)
        check(request)
        _check_resume(request)
        if self._arrivals.running >= self._room:
            raise MeshError(
                Reason.INSTANCE_FULL,
                f"{self._arrivals.running} requests are running or waiting here, at most {self._room}",
                retry_after_s=RETRY_AFTER_S,
            )
        with_ids = relay is not None or request.delivery.token_ids
        with self._arrivals.enter(relay, _guess_tokens(request), movable=_movable(request)) as entry:
            try:
                turn = entry.turn
                source = (
                    run(request) if turn is None else in_turn(lambda: run(request), turn, request.relay.cached_tokens)
                )
                async with aclosing(paced(source, request.delivery.min_interval_ms / 1000)) as events:  # type: ignore[type-var]
                    first = True
                    finished = False
                    async for event in events:
                        if not with_ids:
                            for delta in event.deltas:
                                delta.ClearField("token_ids")
                        message = response(deltas=event.deltas)
                        if event.usage is not None:
                            message.usage.CopyFrom(event.usage)
                            finished = True
                        if first:
                            first = False
                            entry.started()
                            message.started.CopyFrom(self._started(prefix, relay, event.prompt))
                            await announce(context, self._identity)
                        yield message
                        if finished:
                            return
            except OutOfWindow as error:
                context.set_trailing_metadata(((PROMPT_TOKENS_KEY, str(error.prompt_tokens)),))
                raise
            raise MeshError(Reason.ENGINE_FAILED, "the engine ended the answer without its usage")

    def _started(self, prefix: str, relay: Relay | None, prompt: PromptFacts | None) -> lm.Started:
        if prompt is None:
            raise MeshError(Reason.ENGINE_FAILED, "the engine's first event tells nothing of the prompt")
        resume = relay.resume if relay is not None and relay.HasField("resume") else None
        return lm.Started(
            id=(resume.response_id if resume is not None else "") or prefix + secrets.token_hex(12),
            created=(resume.created if resume is not None else 0) or int(time.time()),
            model=self._identity.model,
            instance_id=self._identity.instance_id,
            incarnation=self._identity.incarnation,
            prompt_tokens=prompt.tokens,
            cached_tokens=prompt.cached,
            preempted=prompt.preempted,
            prompt_logprobs=prompt.logprobs,
        )


async def paced(events: AsyncIterator[Event], min_interval_s: float) -> AsyncIterator[Event]:
    """An engine's events, merged by the delivery interval. Closing it closes them, also in the middle of a wait."""
    async with aclosing(events) as source:  # type: ignore[type-var]
        if not min_interval_s:
            async for event in source:
                yield event
            return
        clock = asyncio.get_running_loop().time
        coalescer = Coalescer(min_interval_s)
        coming: asyncio.Task[Event | None] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(next_event(source))
                due = coalescer.due
                timeout = None if due is None else max(0.0, due - clock())
                await asyncio.wait({coming}, timeout=timeout)
                if not coming.done():
                    ready = coalescer.flush(clock())
                else:
                    come, coming = coming.result(), None
                    if come is None:
                        return
                    ready = coalescer.offer(come, clock())
                if ready is not None:
                    yield ready
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})


def _check_resume(request: Generation) -> None:
    if not request.relay.HasField("resume"):
        return
    if request.sampling.n > 1:
        raise invalid("relay.resume", "a stream of more than one choice cannot be resumed")
    if request.sampling.HasField("prompt_logprobs"):
        raise invalid("relay.resume", "a stream with prompt_logprobs cannot be resumed")


def _movable(request: Generation) -> bool:
    """Whether the engine would find what it has computed of the prompt: for its logprobs it computes all of it."""
    sampling = request.sampling
    echoed = isinstance(request, lm.CompleteRequest) and request.echo and sampling.HasField("logprobs")
    return not echoed and not sampling.HasField("prompt_logprobs")


def _guess_tokens(request: Generation) -> int:
    """Prompt tokens that nobody has counted, where no gateway tells: about four bytes each. What another instance has
    said of the answer is computed like them."""
    said = len(request.relay.resume.token_ids)
    if isinstance(request, lm.CompleteRequest):
        return said + (len(request.token_ids.ids) or _size(request.text) // 4)
    return said + sum(_size(m.content) + sum(_size(part.text) for part in m.parts) for m in request.messages) // 4


def _size(text: str) -> int:
    """In bytes, as gateways estimate: a character of Chinese is three of them, and most of a token."""
    return len(text) if text.isascii() else len(text.encode())
