"""Tokenizer, queue and replicas of one instance, as the two services use them."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from infermesh.errors import MeshError, Reason
from infermesh.v1.worker_pb2 import Load
from registry.endpoint import Capacity, Endpoint, Hardware, Speed
from services.chassis.encoding.dispatch import Dispatcher
from services.chassis.encoding.encoder import ModelFacts, Purpose
from services.chassis.encoding.replicas import ReplicaLost, ReplicaPool, ReplicaRefused
from services.chassis.encoding.rows import Floats, Ids, Row
from services.chassis.encoding.settings import EncodingSettings, cores
from services.chassis.encoding.speed import measure
from services.chassis.encoding.tokens import TextTokenizer

INLINE_CHARACTERS = 2000  # texts shorter than this in sum are tokenised on the loop: about a millisecond
CHARACTERS_PER_TEXT = 16  # what a text costs beside its length, in characters
BATCH_S = 0.1  # what a batch should take: online work waits for no longer than that behind bulk work
LEAST_BATCH, MOST_BATCH = 1024, 16384  # padded tokens
MAX_RUNNING = 256
SWITCH_S = 0.0005  # the loop waits for the interpreter lock behind a tokenising thread for at most so long
T = TypeVar("T")
log = structlog.get_logger("encoding")


class EncodingEngine:
    facts: ModelFacts
    tokenizer: TextTokenizer

    def __init__(self, settings: EncodingSettings, purpose: Purpose, source: str) -> None:
        self._settings = settings
        self.dispatcher = Dispatcher(settings.limits(), settings.batch_timeout_s)
        self._pool = ReplicaPool(settings.plans(purpose, source), self.dispatcher.wake)
        self.dispatcher.attach(self._pool)
        self._threads = ThreadPoolExecutor(2, "tokenizer")

    async def start(self, draft: Endpoint, progress: Callable[[str], None]) -> Endpoint:
        """Loads the model in all replicas, measures them, and completes the endpoint.

        Raises:
            MeshError: FAILED_PRECONDITION, the model cannot be loaded.
        """
        sys.setswitchinterval(SWITCH_S)
        try:
            self.facts = await self._pool.start(progress)
        except (ReplicaLost, ReplicaRefused) as error:
            raise MeshError(Reason.FAILED_PRECONDITION, f"{self._settings.model}: {error}") from None
        facts = self.facts
        log.info(
            "model loaded", backend=facts.backend, why=facts.backend_reason, device=facts.device, dtype=facts.dtype
        )
        self.tokenizer = TextTokenizer(facts.tokenizer, facts.max_tokens)
        progress("measuring")
        token = int(self.tokenizer.encode(["a"])[0][0])
        replicas = max(1, len(self._pool.live))
        measured = await measure(self.dispatcher.run, token, facts.max_tokens, replicas)
        if not self._settings.batch_tokens:
            fitting = min(MOST_BATCH, max(LEAST_BATCH, round(measured.tokens_per_s / replicas * BATCH_S)))
            batcher = self.dispatcher.batcher
            batcher.limits = dataclasses.replace(batcher.limits, batch_tokens=fitting)
        log.info("measured", **dataclasses.asdict(measured), batch_tokens=self.dispatcher.batcher.limits.batch_tokens)
        speed = Speed(fixed_ms=measured.fixed_ms, tokens_per_s=measured.tokens_per_s, source="observed")
        return self._complete(draft, speed)

    def _complete(self, draft: Endpoint, observed: Speed) -> Endpoint:
        facts, settings = self.facts, self._settings
        declared = settings.speed.model_dump(exclude_none=True)
        plans = settings.plans("embedding", "-")
        on_cpu = facts.device == "cpu"
        extra = {
            "device_name": facts.device_name,
            "devices": ",".join(sorted({facts.device if plan.device == "auto" else plan.device for plan in plans})),
            "replicas": str(len(plans)),
            "backend": facts.backend,
        }
        if on_cpu:
            extra |= {"threads": str(sum(plan.threads for plan in plans)), "cores": str(cores())}
        return dataclasses.replace(
            draft,
            engine="sentence-transformers",
            engine_version=facts.engine_version,
            dtype=facts.dtype,
            hardware=Hardware(
                device=settings.device or ("cpu" if on_cpu else facts.device_name), count=len(set(settings.devices))
            ),
            speed=dataclasses.replace(observed, **declared, source="declared") if declared else observed,
            capacity=Capacity(context_max=facts.max_tokens, max_running=settings.max_running or MAX_RUNNING),
            weights_version=facts.weights_version,
            tokenizer_digest=self.tokenizer.digest,
            extra={**draft.extra, **extra},
        )

    async def tokenize(self, texts: Sequence[str]) -> list[Ids]:
        """Ids without special tokens; long texts beside the loop."""
        if sum(map(len, texts)) + CHARACTERS_PER_TEXT * len(texts) < INLINE_CHARACTERS:
            return self.tokenizer.encode(texts)
        return await self.beside(lambda: self.tokenizer.encode(texts))

    async def beside(self, work: Callable[[], T]) -> T:
        """Runs something longer than a millisecond beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def run(
        self, rows: Sequence[Row], *, bulk: bool = False, priority: int = 0, started: Callable[[], None] = lambda: None
    ) -> Floats:
        """See `Dispatcher.run`."""
        return await self.dispatcher.run(rows, bulk=bulk, priority=priority, started=started)

    async def run_patiently(
        self, rows: Sequence[Row], *, bulk: bool = False, priority: int = 0, started: Callable[[], None] = lambda: None
    ) -> Floats:
        """The same for work that can wait: never INSTANCE_FULL."""
        while True:
            if self._has_room:
                try:
                    return await self.run(rows, bulk=bulk, priority=priority, started=started)
                except MeshError as error:
                    if error.reason is not Reason.INSTANCE_FULL:
                        raise
            await self.dispatcher.change()

    @property
    def _has_room(self) -> bool:
        """Patient work keeps away from the upper half of the queue, which is left to those who cannot wait."""
        batcher = self.dispatcher.batcher
        return 2 * batcher.tokens < batcher.limits.queue_tokens and 2 * len(batcher) < batcher.limits.queue_rows

    def load(self) -> Load:
        dispatcher = self.dispatcher
        return Load(
            running=dispatcher.running,
            waiting=dispatcher.waiting,
            queued_tokens=dispatcher.batcher.tokens,
            steps=dispatcher.batches,
        )

    async def died(self) -> str:
        return await self._pool.died()

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._pool.close()
