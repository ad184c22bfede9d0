"""vLLM's AsyncLLM in this process, behind the engine port.

vLLM is imported by `start`, in a thread: it takes seconds, and the gRPC server answers meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.worker_pb2 import Load
from services.chassis.held_prefixes import HeldPrefixes
from services.chassis.telemetry import BELOW
from services.llm.engine import Computed, EngineInfo, Event, unheard
from services.llm.engines.vllm_events import KvEvents
from services.llm.engines.vllm_launch import Launched, launch
from services.llm.engines.vllm_stop import stop
from services.llm.settings import LlmSettings
from services.llm.window import Window

if TYPE_CHECKING:
    from services.llm.engines.vllm_render import Prompt

STILL_LOADING_S = 10.0  # between two lines for an operator who waits
BREATH = 32  # replayed tokens between two breaths of the event loop
CHECK_S = 0.25  # how often a live engine process is asked whether its engine lives
REAPING_S = 0.05  # vLLM waits for its processes too: while one of us reaps one, the other sees no exit code


class VllmEngine:
    def __init__(self, settings: LlmSettings, held: HeldPrefixes | None = None, computed: Computed = unheard) -> None:
        self._settings = settings
        self._events = KvEvents(held or HeldPrefixes())
        self._computed = computed
        self._loading: asyncio.Task[Launched] | None = None
        self._launched: Launched | None = None
        self._started = asyncio.Event()
        self._processes: list[Any] = []
        self._window = Window(0)
        self._defaults: dict[str, Any] = {}
        self._kv_tokens = 0
        self._text_lock = asyncio.Lock()
        self._text_tokenizer: Any = None

    async def start(self, progress: Callable[[str], None]) -> EngineInfo:
        began = time.monotonic()
        loop = asyncio.get_running_loop()

        def line(text: str) -> None:
            loop.call_soon_threadsafe(progress, text)

        self._loading = asyncio.create_task(asyncio.to_thread(launch, self._settings, line, self._events.open()))
        while not (await asyncio.wait({self._loading}, timeout=STILL_LOADING_S))[0]:
            progress(f"still loading, {time.monotonic() - began:.0f} s")
        launched = self._loading.result()
        launched.counters.computed = self._computed
        from services.llm.engines.vllm_info import engine_info

        self._processes = multiprocessing.active_children()
        info, self._text_tokenizer = await asyncio.to_thread(engine_info, self._settings, launched)
        low, high = self._settings.context or (0, 0)
        self._window = Window(info.capacity.context_max, low, high)
        self._defaults = launched.engine.model_config.get_diff_sampling_param()
        self._kv_tokens = info.capacity.kv_tokens
        self._events.follow(launched.engine.vllm_config.kv_events_config, info.capacity.kv_block)
        self._launched = launched
        self._started.set()
        progress("warming up")
        await self._warm_up()
        progress(f"ready after {time.monotonic() - began:.1f} s")
        return info

    async def chat(self, request: lm.ChatRequest) -> AsyncGenerator[Event]:
        """See the port."""
        async with aclosing(self._chat(request)) as events:
            async for event in self._translated(events, request):
                yield event

    async def complete(self, request: lm.CompleteRequest) -> AsyncGenerator[Event]:
        """See the port. With `echo`, prompt_logprobs default to `logprobs`, as OpenAI's completions have it."""
        async with aclosing(self._complete(request)) as events:
            async for event in self._translated(events, request):
                yield event

    async def _chat(self, request: lm.ChatRequest) -> AsyncGenerator[Event]:
        prompt = await self._ready.renderer.chat(request, time.time())
        self._events.tie(request, prompt.ids)
        choice = request.tool_choice
        async with aclosing(
            self._generate(
                prompt,
                request.sampling,
                list(request.relay.resume.token_ids),
                parallel_tools=choice.parallel if choice.HasField("parallel") else True,
                forced_function=choice.mode == lm.ToolChoice.MODE_FUNCTION,
            )
        ) as events:
            async for event in events:
                yield event

    async def _complete(self, request: lm.CompleteRequest) -> AsyncGenerator[Event]:
        prompt = await self._ready.renderer.complete(request)
        self._events.tie(request, prompt.ids)
        if request.echo and request.WhichOneof("prompt") == "token_ids":
            self._budget(len(prompt.ids), request.sampling)  # before a text of a million tokens is made
            prompt.text = await self._text(prompt.ids)
        async with aclosing(
            self._generate(prompt, request.sampling, list(request.relay.resume.token_ids), echo=request.echo)
        ) as events:
            async for event in events:
                yield event

    async def _generate(
        self,
        prompt: Prompt,
        sampling: lm.Sampling,
        done: list[int],
        *,
        echo: bool = False,
        parallel_tools: bool = True,
        forced_function: bool = False,
    ) -> AsyncGenerator[Event]:
        """`done`: what another instance has delivered of it, which is replayed before the engine goes on."""
        from services.llm.engines.vllm_output import Answer
        from services.llm.engines.vllm_params import sampling_params
        from services.llm.engines.vllm_replay import Voice, remaining

        prompt_top = sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None
        if echo and prompt_top is None and sampling.HasField("logprobs"):
            prompt_top = sampling.logprobs
        if done:
            prompt_top = None  # they went out with the first message
            self._check_ids("relay.resume.token_ids", done)
        budget = self._budget(len(prompt.ids), sampling)
        params = partial(
            sampling_params,
            defaults=self._defaults,
            structured=prompt.structured,
            keep_special_tokens=prompt.keep_special_tokens,
            prompt_logprobs=prompt_top,
        )
        whole = params(sampling, max_tokens=budget, more_stops=prompt.stops)
        alone = whole.n == 1 and (done or prompt.make_parser is not None)
        answer = Answer(
            prompt,
            self._text_tokenizer,
            choices=whole.n,
            top=sampling.logprobs if sampling.HasField("logprobs") else None,
            prompt_top=prompt_top,
            echo=prompt.text if echo else "",
            parallel_tools=parallel_tools,
            forced_function=forced_function,
            voice=Voice(self._ready.engine.renderer.get_tokenizer(), whole, prompt.ids) if alone else None,
        )
        engine_input, reasoning = prompt.engine_input, prompt.reasoning
        if done:
            rest, left = remaining(sampling, len(done), budget)
            for at in range(0, len(done), BREATH):
                answer.replay(done[at : at + BREATH])
                await asyncio.sleep(0)
            if answer.over or not left:
                yield answer.rest()
                return
            whole = params(rest, max_tokens=left)
            engine_input, reasoning = prompt.after(done)
        engine = self._ready.engine
        if engine.observability_config.otlp_traces_endpoint is not None:
            reasoning["trace_headers"] = dict(BELOW.get())
        outputs = engine.generate(engine_input, whole, secrets.token_hex(12), **reasoning)
        async with aclosing(outputs):
            async for output in outputs:
                event = answer.event(output)
                if event is not None:
                    yield event
                    if event.usage is not None:
                        return  # the engine may not know: a stop string that spans the seam

    def _budget(self, prompt_tokens: int, sampling: lm.Sampling) -> int:
        """Tokens the answer may have: what was asked, else the model's own default, else what fits."""
        fits = self._window.budget(prompt_tokens, sampling)
        default = self._defaults.get("max_tokens")
        if sampling.HasField("max_tokens") or not default:
            return fits
        return max(min(fits, default), sampling.min_tokens)

    async def tokenize(self, request: lm.TokenizeRequest) -> lm.TokenizeResponse:
        renderer = self._ready.renderer
        try:
            if request.WhichOneof("input") == "chat":
                chat = request.chat
                asked = lm.ChatRequest(
                    messages=chat.messages,
                    tools=chat.tools,
                    template_args_json=chat.template_args_json,
                    tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_NONE),
                    relay=request.relay,
                )
                if chat.HasField("add_generation_prompt"):
                    asked.add_generation_prompt = chat.add_generation_prompt
                ids = (await renderer.chat(asked, time.time())).ids
            else:
                special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                ids = await renderer.tokens(request.text, add_special_tokens=special) if request.text else []
        except Exception as error:
            from services.llm.engines.vllm_errors import translate

            raise translate(error, request, self._window.model) from error
        tokenizer = self._text_tokenizer
        async with self._text_lock:
            tokens = await asyncio.to_thread(lambda: [tokenizer.decode([token]) for token in ids])
        return lm.TokenizeResponse(token_ids=ids, max_context=self._window.model, tokens=tokens)

    async def detokenize(self, request: lm.DetokenizeRequest) -> lm.DetokenizeResponse:
        ids = list(request.token_ids)
        self._check_ids("token_ids", ids)
        return lm.DetokenizeResponse(text=await self._text(ids))

    def _check_ids(self, param: str, ids: list[int]) -> None:
        vocabulary = self._ready.engine.model_config.get_vocab_size()
        if ids and max(ids) >= vocabulary:
            raise invalid(param, f"{max(ids)} is not among the model's {vocabulary} tokens")

    async def _text(self, ids: list[int]) -> str:
        """Beside the loop, and with our own tokenizer."""
        async with self._text_lock:
            return str(await asyncio.to_thread(self._text_tokenizer.decode, ids))

    def load(self) -> Load:
        if self._launched is None:
            return Load()
        return self._launched.counters.load(self._kv_tokens, self._launched.engine.get_num_queued_tokens())

    async def died(self) -> str:
        """A killed engine process is seen at once, through its sentinel; an engine that gave up, within `CHECK_S`. What
        goes wrong before `start` is over is told by `start`.
        """
        await self._started.wait()
        launched = self._ready
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        for process in self._processes:
            loop.add_reader(process.sentinel, gone.set)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CHECK_S):
                        await gone.wait()
                gave_up = launched.engine.errored
                if gave_up or gone.is_set():
                    await asyncio.sleep(REAPING_S)
                    if ended := self._ended():
                        return ended
                if gave_up:
                    return f"vLLM's engine gave up: {launched.engine.dead_error}"
        finally:
            for process in self._processes:
                loop.remove_reader(process.sentinel)

    def _ended(self) -> str:
        """Which of the engine's processes is over, and how; empty while none is."""
        for process in self._processes:
            if process.exitcode is not None:
                return f"vLLM's {process.name} (pid {process.pid}) ended with {_ending(process.exitcode)}"
        return ""

    async def close(self) -> None:
        """Also in the middle of a load, which cannot be interrupted but fails when its processes go."""
        try:
            await self._stop()
        finally:
            await self._events.close()

    async def _stop(self) -> None:
        if self._loading is not None and not self._loading.done():
            while not (await asyncio.wait({self._loading}, timeout=0.2))[0]:
                for process in multiprocessing.active_children():
                    process.terminate()
        if self._loading is None or self._loading.cancelled() or self._loading.exception() is not None:
            return
        engine = self._loading.result().engine
        self._launched = self._loading = None
        if engine.output_handler is not None:
            engine.output_handler.cancel()  # or it reports the end that is asked for here as an error
        await asyncio.to_thread(stop, engine)

    @property
    def _ready(self) -> Launched:
        if self._launched is None:
            raise MeshError(Reason.DRAINING, "the engine is not running")
        return self._launched

    async def _translated(
        self, events: AsyncIterator[Event], request: lm.ChatRequest | lm.CompleteRequest
    ) -> AsyncGenerator[Event]:
        from services.llm.engines.vllm_errors import translate

        started = False
        try:
            async for event in events:
                yield event
                started = True
        except Exception as error:
            raise translate(error, request, self._window.model, started=started) from error

    async def _warm_up(self) -> None:
        """Real answers through the whole path, so that no caller pays for what is built at first use."""
        request = lm.CompleteRequest(
            text="Once upon a time", sampling=lm.Sampling(max_tokens=8, ignore_eos=True, temperature=0)
        )
        async for _ in self.complete(request):
            pass
        # The first chat builds the parsers and the template. Models without one are served by completion alone.
        with contextlib.suppress(MeshError):
            hello = lm.ChatRequest(messages=[lm.Message(role=lm.ROLE_USER, content="Hello")])
            hello.sampling.max_tokens = 1
            async for _ in self.chat(hello):
                pass


def _ending(exitcode: int) -> str:
    return f"signal {-exitcode}" if exitcode < 0 else f"code {exitcode}"
