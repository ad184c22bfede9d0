"""EmbeddingService: texts or token ids to packed vectors; one list a call, or a stream of batches for bulk work."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import numpy as np

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import embedding_pb2_grpc
from infermesh.v1.inference_pb2 import Relay, Usage, Vector
from registry.endpoint import Endpoint
from services.chassis.admittance import admit
from services.chassis.arrivals import Arrivals
from services.chassis.checks import check_embed
from services.chassis.encoding.engine import EncodingEngine
from services.chassis.encoding.rows import Ids, Row
from services.chassis.encoding.tokens import Cut, TextTokenizer, TooLong, cut_of
from services.chassis.identity import Identity, announce
from services.chassis.keys import Keys
from services.chassis.rpc import Context, stream, unary
from services.embedding.vectors import check_dimensions, chunk_rows, finish

SERVICE = "infermesh.v1.EmbeddingService"
IN_FLIGHT = 8  # batches of one stream
INLINE_ROWS, INLINE_BYTES = 256, 8192  # more than that is prepared beside the loop


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """`serve` tells it what is served once the model is in; the chassis lets no call in before."""

    def __init__(self, engine: EncodingEngine, identity: Identity, arrivals: Arrivals, keys: Keys) -> None:
        self._engine = engine
        self._identity = identity
        self._arrivals = arrivals
        self._keys = keys
        self._names: frozenset[str] = frozenset()

    def serve(self, endpoint: Endpoint) -> None:
        self._names = frozenset((endpoint.model, *endpoint.aliases))

    @unary
    async def Embed(self, request: em.EmbedRequest, context: Context) -> em.EmbedResponse:
        relay = admit(request, context, self._keys, self._names)
        reply = await self._embed(request, relay, bulk=request.hints.priority < 0)
        await announce(context, self._identity)
        return reply

    @stream
    async def EmbedStream(
        self, requests: AsyncIterator[em.EmbedStreamRequest], context: Context
    ) -> AsyncIterator[em.EmbedStreamResponse]:
        pending: deque[asyncio.Task[em.EmbedStreamResponse]] = deque()
        slots = asyncio.Semaphore(IN_FLIGHT)
        arrived = asyncio.Event()
        reader = asyncio.create_task(self._read(requests, context, pending, slots, arrived))
        reader.add_done_callback(lambda _: arrived.set())
        first = True
        try:
            while True:
                if not pending:
                    if reader.done():
                        reader.result()
                        return
                    arrived.clear()
                    await arrived.wait()
                    continue
                reply = await pending.popleft()
                if first:
                    first = False
                    await announce(context, self._identity)
                yield reply
                # Only now: a reply that nobody reads counts as in flight.
                slots.release()
        finally:
            reader.cancel()
            for task in pending:
                task.cancel()
            await asyncio.gather(reader, *pending, return_exceptions=True)

    async def _read(
        self,
        requests: AsyncIterator[em.EmbedStreamRequest],
        context: Context,
        pending: deque[asyncio.Task[em.EmbedStreamResponse]],
        slots: asyncio.Semaphore,
        arrived: asyncio.Event,
    ) -> None:
        """Starts the batches in order, at most IN_FLIGHT of them; ends with the stream, or at the first bad batch."""
        first: em.EmbedRequest | None = None
        relay: Relay | None = None
        while True:
            await slots.acquire()
            message = await anext(aiter(requests), None)
            if message is None:
                return
            batch = message.batch
            if first is None:
                first = batch
                relay = admit(batch, context, self._keys, self._names)
            else:
                inherit(batch, first)
                if batch.model != first.model:
                    raise invalid("batch.model", "one stream is for one model")
            pending.append(asyncio.create_task(self._reply(message.tag, batch, relay)))
            arrived.set()

    async def _reply(self, tag: int, batch: em.EmbedRequest, relay: Relay | None) -> em.EmbedStreamResponse:
        reply = await self._embed(batch, relay, bulk=batch.hints.priority <= 0, patient=True)
        return em.EmbedStreamResponse(batch=reply, tag=tag)

    async def _embed(
        self, request: em.EmbedRequest, relay: Relay | None, *, bulk: bool, patient: bool = False
    ) -> em.EmbedResponse:
        check_embed(request)
        facts = self._engine.facts
        dimensions = check_dimensions(request.dimensions, facts.columns)
        rows = await self._rows(request)
        tokens = sum(map(len, rows))
        unit = request.normalize if request.HasField("normalize") else facts.normalizes
        with self._arrivals.enter(relay, tokens) as entry:
            run = self._engine.run_patiently if patient else self._engine.run
            values = await run(rows, bulk=bulk, priority=request.hints.priority, started=entry.started)
            vectors: list[Vector] = []
            step = chunk_rows(facts.columns)
            for start in range(0, len(values), step):
                vectors += finish(values[start : start + step], dimensions, unit=unit)
                await asyncio.sleep(0)
        return em.EmbedResponse(
            vectors=vectors, usage=Usage(prompt_tokens=tokens), model=self._identity.model, dimensions=dimensions
        )

    async def _rows(self, request: em.EmbedRequest) -> list[Row]:
        """The inputs as the model's rows."""
        facts = self._engine.facts
        cut = cut_of(request.truncation)
        if request.max_tokens > facts.max_tokens:
            raise invalid("max_tokens", f"{request.max_tokens} is more than the model's {facts.max_tokens}")
        limit = request.max_tokens or facts.max_tokens
        if request.token_ids:

            def take() -> list[Row]:
                return [
                    _checked(index, np.array(entry.ids, np.int64), facts.vocabulary, limit, cut)
                    for index, entry in enumerate(request.token_ids)
                ]

            return await self._engine.beside(take) if request.ByteSize() > INLINE_BYTES else take()
        tokenizer = self._engine.tokenizer
        if limit <= tokenizer.single.specials:
            raise invalid("max_tokens", f"{limit} leaves no room beside {tokenizer.single.specials} special tokens")
        prompt = self._prompt(request)
        skip = tokenizer.prompt_tokens(prompt) if prompt and not facts.pools_prompt else 0
        found = await self._engine.tokenize([prompt + text for text in request.texts] if prompt else request.texts)

        def build() -> list[Row]:
            return [_row(tokenizer, index, ids, limit, cut, skip) for index, ids in enumerate(found)]

        return await self._engine.beside(build) if len(found) > INLINE_ROWS else build()

    def _prompt(self, request: em.EmbedRequest) -> str:
        facts = self._engine.facts
        if request.prefix or not request.task:
            return request.prefix or facts.default_prompt
        if request.task not in facts.prompts:
            known = ", ".join(sorted(facts.prompts)) or "it has none"
            raise invalid("task", f"the model has no prompt {request.task!r}; known: {known}")
        return facts.prompts[request.task]


def _row(tokenizer: TextTokenizer, index: int, ids: Ids, limit: int, cut: Cut, skip: int) -> Row:
    try:
        row = tokenizer.row(ids, cut=cut, limit=limit, skip=skip)
    except TooLong as error:
        raise _too_long(f"texts[{index}]", error) from None
    if not len(row):
        raise invalid(f"texts[{index}]", "has no token in this model's vocabulary")
    return row


def _checked(index: int, ids: np.ndarray, vocabulary: int, limit: int, cut: Cut) -> Row:
    """Token ids are taken as they are: a caller who tokenises also sets the special tokens."""
    if int(ids.max()) >= vocabulary:
        raise invalid(f"token_ids[{index}]", f"{int(ids.max())} is not below the vocabulary's {vocabulary}")
    if len(ids) > limit and cut is Cut.NONE:
        raise _too_long(f"token_ids[{index}]", TooLong(len(ids), limit))
    kept: Ids = ids.astype(np.int32)
    return Row(kept[-limit:] if cut is Cut.START else kept[:limit])


def _too_long(param: str, error: TooLong) -> MeshError:
    return MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, f"{param} has {error}", param=param)


def inherit(batch: em.EmbedRequest, first: em.EmbedRequest) -> None:
    """What a later batch of a stream leaves empty is as in the first."""
    for name in ("model", "truncation", "dimensions", "max_tokens"):
        if not getattr(batch, name):
            setattr(batch, name, getattr(first, name))
    if not batch.HasField("normalize") and first.HasField("normalize"):
        batch.normalize = first.normalize
    if not batch.task and not batch.prefix and batch.texts:
        batch.task, batch.prefix = first.task, first.prefix
    if not batch.HasField("hints"):
        batch.hints.CopyFrom(first.hints)
