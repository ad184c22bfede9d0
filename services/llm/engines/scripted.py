"""An engine without a model, for tests and demos: it answers ` w0 w1 w2 …`, one word a token.

Its text is always the same, so temperature, top_p, top_k, min_p, penalties and seed are accepted and change nothing.
Its timing, queueing and prefix cache are real (`scripted_batch`, `scripted_cache`); what it does not do is refused by
name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import infermesh
from infermesh.errors import MeshError, Reason, unsupported
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.worker_pb2 import Load
from registry.endpoint import Capacity, Hardware
from services.chassis.held_prefixes import HeldPrefixes
from services.chassis.prefix import block_share
from services.llm.engine import Computed, EngineInfo, Event, unheard
from services.llm.engines.scripted_answer import Answer, replay
from services.llm.engines.scripted_batch import Batch, Job, Pace
from services.llm.engines.scripted_cache import BLOCK, Blocks
from services.llm.engines.scripted_text import Words
from services.llm.settings import LlmSettings
from services.llm.window import OutOfWindow, Window

COMPLETE_TOKENS = 16  # OpenAI's default for a completion
MAX_RUNNING = 256
KV_TOKENS = 1 << 20
MAX_LAG_S = 0.05  # what a busy host made us lose is caught up to this much
BREATH = 1024  # tokens of prompt between two breaths of the event loop
FEATURES = frozenset({"echo", "logprobs", "n", "resume", "token_ids"})
_MARKERS = {
    lm.ROLE_SYSTEM: "\n<|system|>",
    lm.ROLE_DEVELOPER: "\n<|system|>",
    lm.ROLE_USER: "\n<|user|>",
    lm.ROLE_ASSISTANT: "\n<|assistant|>",
    lm.ROLE_TOOL: "\n<|tool|>",
}


class ScriptedEngine:
    def __init__(self, settings: LlmSettings, held: HeldPrefixes | None = None, computed: Computed = unheard) -> None:
        speed = settings.speed
        self._options = settings.scripted
        self._window = Window(settings.scripted.max_context, *(settings.context or (0, 0)))
        self._max_running = settings.max_running or MAX_RUNNING
        self._held = held or HeldPrefixes()
        self._held.live = True
        self._computed = computed
        capacity = max(1, (settings.kv_tokens or KV_TOKENS) // BLOCK)
        self._blocks = Blocks(capacity, self._held.stored, self._held.removed)
        pace = Pace(
            speed.prefill_tps or 0, speed.prefill_doubling_ctx or 0, speed.step_ms or 0, speed.kv_us_per_ktoken or 0
        )
        self._batch = Batch(pace, self._max_running, self._blocks, settings.scripted.prefill_chunk)
        self._model = settings.model
        self._device = settings.device or "cpu"
        self._words = Words()
        self._kick = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    async def start(self, progress: Callable[[str], None]) -> EngineInfo:
        if self._options.fail_start:
            raise MeshError(Reason.FAILED_PRECONDITION, "the scripted engine was told to fail at start")
        self._stepping = asyncio.create_task(self._step_on())
        self._stepping.add_done_callback(lambda task: self._over.set())
        return EngineInfo(
            engine="scripted",
            engine_version=infermesh.__version__,
            model=self._model,
            hardware=Hardware(device=self._device),
            capacity=Capacity(
                context_min=self._window.low,
                context_max=self._window.top,
                max_running=self._max_running,
                kv_tokens=self._blocks.capacity * BLOCK,
                kv_block=BLOCK,
            ),
            features=FEATURES,
            weights_version="scripted-1",
            tokenizer_digest="words-1",
            template_digest="markers-1",
        )

    async def chat(self, request: lm.ChatRequest) -> AsyncIterator[Event]:
        if request.tools:
            raise unsupported("tools", "the scripted engine calls no tools")
        if request.template_args_json:
            raise unsupported("template_args_json", "the scripted engine's template takes no arguments")
        prompt = await self._count(self._render(request))
        answer = self._answer(prompt, request, self._options.chat_tokens, natural_end=True)
        async for event in self._run(answer, request):
            yield event

    async def complete(self, request: lm.CompleteRequest) -> AsyncIterator[Event]:
        if request.WhichOneof("prompt") == "token_ids":
            prompt = list(request.token_ids.ids)
        else:
            prompt = await self._count(self._words.encode(request.text))
        answer = self._answer(prompt, request, COMPLETE_TOKENS, natural_end=False)
        if request.echo:
            answer.prefix = self._words.decode(prompt) if request.WhichOneof("prompt") == "token_ids" else request.text
        async for event in self._run(answer, request):
            yield event

    async def tokenize(self, request: lm.TokenizeRequest) -> lm.TokenizeResponse:
        if request.chat.tools or request.chat.template_args_json:
            raise unsupported("chat.tools" if request.chat.tools else "chat.template_args_json", "not in the script")
        if request.WhichOneof("input") == "chat":
            chat = lm.ChatRequest(messages=request.chat.messages)
            if request.chat.HasField("add_generation_prompt"):
                chat.add_generation_prompt = request.chat.add_generation_prompt
            ids = await self._count(self._render(chat))
        else:
            ids = await self._count(self._words.encode(request.text))
        return lm.TokenizeResponse(
            token_ids=ids, max_context=self._window.top, tokens=[self._words.text(token_id) for token_id in ids]
        )

    async def detokenize(self, request: lm.DetokenizeRequest) -> lm.DetokenizeResponse:
        return lm.DetokenizeResponse(text=self._words.decode(request.token_ids))

    def load(self) -> Load:
        return Load(
            running=len(self._batch.running),
            waiting=len(self._batch.waiting),
            queued_tokens=self._batch.queued_tokens,
            kv_used_ratio=self._batch.kv_used_ratio,
            steps=self._batch.steps,
            resident_tokens=self._batch.resident_tokens,
        )

    async def died(self) -> str:
        await self._over.wait()
        return "the scripted engine's loop broke"

    async def close(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait({self._stepping})

    async def _step_on(self) -> None:
        """One task steps the batch; a step lasts as long as the model says, whatever computing it cost us."""
        clock = asyncio.get_running_loop().time
        over = clock()
        while True:
            step = self._batch.plan()
            if step is None:
                self._kick.clear()
                await self._kick.wait()
                over = clock()
                continue
            over = max(over, clock() - MAX_LAG_S) + step.seconds
            await asyncio.sleep(max(0.0, over - clock()))
            self._batch.finish(step)
            self._computed(sum(new for _, new in step.prefill))

    def _render(self, request: lm.ChatRequest) -> Iterator[int]:
        """The template: a marker a message, then its texts. Nothing of it depends on the time."""
        for message in request.messages:
            yield from self._words.encode(_MARKERS[message.role])
            calls = [f"{call.id} {call.name} {call.arguments_json}" for call in message.tool_calls]
            parts = [part.text for part in message.parts] or [message.content]
            for text in (message.name, message.tool_call_id, message.reasoning, *parts, *calls):
                yield from self._words.encode(text)
        generates = request.add_generation_prompt if request.HasField("add_generation_prompt") else True
        if generates and not request.continue_final_message:
            yield from self._words.encode(_MARKERS[lm.ROLE_ASSISTANT])

    async def _count(self, token_ids: Iterator[int]) -> list[int]:
        ids: list[int] = []
        for token_id in token_ids:
            ids.append(token_id)
            if len(ids) % BREATH == 0:
                await asyncio.sleep(0)
        return ids

    def _answer(
        self, prompt: list[int], request: lm.ChatRequest | lm.CompleteRequest, default: int, *, natural_end: bool
    ) -> Answer:
        sampling = request.sampling
        if request.constraint.WhichOneof("constraint"):
            raise unsupported(f"constraint.{request.constraint.WhichOneof('constraint')}", "the answer is scripted")
        if sampling.HasField("prompt_logprobs"):
            raise unsupported("sampling.prompt_logprobs", "the scripted engine has none")
        if sampling.logit_bias:
            raise unsupported("sampling.logit_bias", "the answer is scripted")
        budget = self._window.budget(len(prompt), sampling)
        limit = budget
        finish: lm.Finish.ValueType = lm.FINISH_LENGTH
        if not sampling.HasField("max_tokens") and not (natural_end and sampling.ignore_eos):
            wish = max(default, sampling.min_tokens)
            limit = min(wish, budget)
            if natural_end and wish <= budget:
                finish = lm.FINISH_STOP
        return Answer(prompt, sampling, limit, finish)

    async def _run(self, answer: Answer, request: lm.ChatRequest | lm.CompleteRequest) -> AsyncIterator[Event]:
        relay = request.relay
        done = replay(answer, relay.resume.token_ids)
        ready = asyncio.Event()
        job = Job(
            tokens=answer.prompt + done,
            salt=relay.cache_salt,
            target=answer.limit - len(done),
            first_word=len(done),
            choices=answer.choices,
            wake=ready.set,
        )
        if job.blocks > self._blocks.capacity:
            raise OutOfWindow(
                f"{job.blocks * BLOCK} tokens of KV cache are needed, there are {self._blocks.capacity * BLOCK} here",
                len(answer.prompt),
            )
        if answer.over:  # the lost instance had said everything but the end
            yield answer.event(0, 0)
            return
        self._batch.add(job)
        if chain := relay.prefix_chain:
            prompt = len(answer.prompt)
            self._held.tie(chain, block_share(request), prompt, job.chain[: prompt // BLOCK], BLOCK)
        self._kick.set()
        told = 0
        try:
            while not answer.over:
                await ready.wait()
                ready.clear()
                event = answer.event(job.made - told, job.cached)
                told = job.made
                yield event
                if 0 < self._options.fail_after_tokens <= told and not answer.over:
                    raise MeshError(Reason.ENGINE_FAILED, f"the scripted engine was told to fail after {told} tokens")
        finally:
            self._batch.remove(job)
            self._kick.set()
