"""Requests that measure an instance through its own door, as clients meet it: gRPC, checks and engine included.

Prompts are common words in random order, so that no cache knows them; how many tokens they were is what the instance
says, not what was wished for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc.aio

from deploy.planner.fit import Batch, Decode, Prefill
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import rerank_pb2 as rr
from infermesh.v1.embedding_pb2_grpc import EmbeddingServiceStub
from infermesh.v1.language_model_pb2_grpc import LanguageModelServiceStub
from infermesh.v1.rerank_pb2_grpc import RerankServiceStub

WORDS = (
    *("the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with", "his"),
    *(
        "they",
        "at",
        "be",
        "this",
        "have",
        "from",
        "or",
        "one",
        "had",
        "by",
        "word",
        "but",
        "not",
        "what",
        "all",
        "were",
    ),
    *("we", "when", "your", "can", "said", "there", "use", "an", "each", "which", "she", "do", "how", "their", "if"),
)
SAMPLE_ROUNDS = 4  # of all words: what they have in tokens tells the mean of a word
GUESSED_TOKENS = 1.3  # of a word, where nobody tells
LEAST_STEPS = 8  # tokens of every stream while all of them decode; fewer say nothing
SPARE_STEPS = 32


@dataclass(slots=True)
class Stream:
    """One answer as it came: (seconds, tokens so far)."""

    begun: float
    seen: list[tuple[float, int]] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0

    def tokens_at(self, moment: float) -> int:
        return max((count for at, count in self.seen if at <= moment), default=0)


class LlmProbes:
    def __init__(self, channel: grpc.aio.Channel, model: str, metadata: Sequence[tuple[str, str]], random: Random):
        self._stub: Any = LanguageModelServiceStub(channel)
        self._model = model
        self._metadata = metadata
        self._random = random
        self._tokens_a_word = GUESSED_TOKENS

    async def learn(self) -> None:
        """How many tokens a word has; a server that cannot tell is guessed at."""
        request = lm.TokenizeRequest(model=self._model, text=_text(SAMPLE_ROUNDS * len(WORDS), self._random))
        try:
            reply = await self._stub.Tokenize(request, metadata=self._metadata)
        except grpc.aio.AioRpcError:
            return
        self._tokens_a_word = max(0.2, len(reply.token_ids) / (SAMPLE_ROUNDS * len(WORDS)))

    async def prefill(self, tokens: int) -> Prefill:
        """One prompt of about so many tokens, alone: seconds to its first token."""
        stream = await self._stream(tokens, 1)
        return Prefill(stream.prompt - stream.cached, stream.cached, stream.seen[0][0] - stream.begun)

    async def decode(self, streams: int, tokens: int) -> Decode | None:
        """So many answers at once, behind prompts of so many tokens: seconds a step while all of them decode. None
        where that was too short to tell."""
        output = SPARE_STEPS + 2 * streams * (1 + tokens // 1024)
        return step_of(await asyncio.gather(*(self._stream(tokens, output) for _ in range(streams))))

    async def _stream(self, tokens: int, output: int) -> Stream:
        request = lm.CompleteRequest(model=self._model, text=_text(round(tokens / self._tokens_a_word), self._random))
        request.sampling.MergeFrom(lm.Sampling(max_tokens=output, temperature=0, ignore_eos=True))
        request.delivery.token_ids = True
        stream = Stream(time.perf_counter())
        count = 0
        async for event in _events(self._stub.Complete(request, metadata=self._metadata)):
            now = time.perf_counter()
            count += sum(len(delta.token_ids) or bool(delta.content) for delta in event.deltas)
            if event.HasField("started"):
                stream.prompt, stream.cached = event.started.prompt_tokens, event.started.cached_tokens
            if event.HasField("usage"):  # an adopted server tells the prompt's length at the end only
                stream.prompt = event.usage.prompt_tokens or stream.prompt
                stream.cached = event.usage.cached_tokens
            stream.seen.append((now, count))
        return stream


def step_of(streams: Sequence[Stream]) -> Decode | None:
    """The pace while all of them decode: prefills, and the end where fewer are left, do not count."""
    begin = max(stream.seen[0][0] for stream in streams)
    end = min(stream.seen[-1][0] for stream in streams)
    made = [stream.tokens_at(end) - stream.tokens_at(begin) for stream in streams]
    if end <= begin or min(made) < LEAST_STEPS:
        return None
    middle = (begin + end) / 2
    resident = sum(stream.prompt + stream.tokens_at(middle) for stream in streams)
    return Decode(len(streams), resident, (end - begin) * len(streams) / sum(made))


class EncoderProbes:
    """Of an embedding or rerank instance; `rows` texts of about `tokens` tokens each."""

    def __init__(
        self, kind: str, channel: grpc.aio.Channel, model: str, metadata: Sequence[tuple[str, str]], random: Random
    ):
        self._call: Callable[..., Any]
        if kind == "embedding":
            self._call = EmbeddingServiceStub(channel).Embed
        else:
            self._call = RerankServiceStub(channel).Rerank
        self._kind = kind
        self._model = model
        self._metadata = metadata
        self._random = random

    async def batch(self, rows: int, tokens: int) -> Batch:
        texts = [_text(tokens - 2, self._random) for _ in range(rows)]
        request: em.EmbedRequest | rr.RerankRequest
        if self._kind == "embedding":
            request = em.EmbedRequest(model=self._model, texts=texts)
        else:
            request = rr.RerankRequest(model=self._model, query=" ".join(WORDS[:4]), documents=texts)
        begun = time.perf_counter()
        reply = await self._call(request, metadata=self._metadata)
        return Batch(reply.usage.prompt_tokens, time.perf_counter() - begun)


def _text(words: int, random: Random) -> str:
    """Every word as often as any other, in random order: texts of as many words have about as many tokens."""
    found: list[str] = []
    while len(found) < max(1, words):
        found += random.sample(WORDS, len(WORDS))
    return " ".join(found[: max(1, words)])


async def _events(call: Any) -> AsyncIterator[Any]:
    """The call's messages; it is cancelled when the reader leaves."""
    try:
        async for event in call:
            yield event
    finally:
        call.cancel()
