"""The vLLM engine's replay, without a model: transcripts of our own instead of an engine core, cut at random places.

    .venv-llm/bin/python -P tests/kit/replay_seams.py MODEL_FOLDER SEAMS [SEED]

What runs is the very code of an instance: `VllmEngine`, its renderer, vLLM's own detokenizer, stop matcher, output
processor and parsers; what is made up is which token comes next. An answer is read once unbroken. Then its stream is
lost after a random event, and a second engine is told the delivered ids and asked to go on, up to three times. Events
are merged at random, as the engine's queue and `Delivery` merge them. Prints one JSON document: the counts, and the
first differences.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from vllm.config import ModelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.renderers import renderer_from_config
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

from infermesh.v1 import language_model_pb2 as lm
from services.llm.delivery import merge
from services.llm.engine import Event
from services.llm.engines.vllm import VllmEngine
from services.llm.engines.vllm_render import Renderer
from services.llm.settings import LlmSettings, VllmOptions
from services.llm.window import Window

TEXTS = [
    "A mesh of model servers. ",
    "用户问:今天天气怎么样?",
    "naïve café — ",
    "🙂🙃🏳️‍🌈 ",
    "line\n\n",
    "\t if x < 1: ",
    "< tool",
    "12.5 % ",
]
TOOLS = [
    lm.Tool(name="weather", parameters_json='{"type":"object","properties":{"city":{"type":"string"}}}'),
    lm.Tool(name="add", parameters_json='{"type":"object","properties":{"a":{"type":"number"}}}'),
]


class Core:
    """Stands where AsyncLLM does, and says `script` after a prompt of `prompt` tokens."""

    def __init__(self, folder: str, dice: random.Random) -> None:
        config = AsyncEngineArgs(model=folder, tokenizer=folder, enforce_eager=True).create_engine_config()
        self.model_config: ModelConfig = config.model_config
        self.observability_config = config.observability_config
        self.renderer = renderer_from_config(config)
        self.tokenizer = self.renderer.get_tokenizer()
        self.eos = self.tokenizer.eos_token_id
        self.dice = dice
        self.script: list[int] = []
        self.prompt = 0

    async def generate(self, prompt: Any, params: Any, request_id: str, **_: Any) -> AsyncIterator[Any]:
        ids = list(prompt["prompt_token_ids"])
        self.prompt = self.prompt or len(ids)
        at = len(ids) - self.prompt
        processor = OutputProcessor(self.tokenizer, log_stats=False)
        processor.add_request(_request(request_id, ids, params), None)
        held: Any = None
        for made in range(1, params.max_tokens + 1):
            token = self.script[at] if at < len(self.script) else self.eos
            at += 1
            reason, cause = self._end(token, made, params)
            output = EngineCoreOutput(request_id, [token], finish_reason=reason, stop_reason=cause)
            done = processor.process_outputs([output])
            (said,) = done.request_outputs
            if held is None:
                held = said
            else:
                held.add(said, aggregate=True)
            if held.finished or self.dice.random() < 0.8:
                yield held
                if held.finished:
                    return
                held = None

    def _end(self, token: int, made: int, params: Any) -> tuple[FinishReason | None, int | None]:
        """As vLLM's scheduler ends a request."""
        if made >= params.min_tokens:
            if token == self.eos and not params.ignore_eos:
                return FinishReason.STOP, None
            if token in (params.stop_token_ids or ()):
                return FinishReason.STOP, token
        return (FinishReason.LENGTH, None) if made >= params.max_tokens else (None, None)


def _request(id: str, ids: list[int], params: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=id,
        prompt_token_ids=ids,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=id,
    )


def engine_on(core: Core, *, parsers: bool) -> VllmEngine:
    options = {"tool_parser": "hermes", "reasoning_parser": "qwen3"} if parsers else {}
    settings = LlmSettings(engine="vllm", model="tiny", source="/nowhere", vllm=VllmOptions(**options))
    engine = VllmEngine(settings)
    renderer = Renderer(settings.vllm, core.model_config, core.renderer, None)
    engine._launched = SimpleNamespace(engine=core, renderer=renderer, counters=None)  # type: ignore[assignment]
    engine._window = Window(4096)
    engine._text_tokenizer = core.tokenizer
    return engine


class Transcript:
    """What a client has. Tool calls' ids are drawn anew by every run and are left out."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.content = self.reasoning = ""
        self.calls: dict[int, list[str]] = {}
        self.ends: list[tuple[int, str, int]] = []
        self.usages: list[tuple[int, int, int]] = []
        self.prompts = 0

    def take(self, event: Event) -> None:
        for delta in event.deltas:
            self.ids += delta.token_ids
            self.content += delta.content
            self.reasoning += delta.reasoning
            for call in delta.tool_calls:
                parts = self.calls.setdefault(call.index, ["", ""])
                parts[0] += call.name
                parts[1] += call.arguments_json
            if delta.finish:
                self.ends.append((delta.finish, delta.stop_text, delta.stop_token))
        if event.usage is not None:
            usage = event.usage
            self.usages.append((usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens))

    def seen(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "prompts"}


def script(dice: random.Random, core: Core, *, chat: bool) -> list[int]:
    """An answer's tokens: text in several scripts, thoughts, calls, and noise that is no text at all."""
    parts = ["".join(dice.choices(TEXTS, k=dice.randint(1, 8)))]
    if chat and dice.random() < 0.6:
        parts.insert(0, f"<think>\n{dice.choice(TEXTS)}{dice.choice(TEXTS)}\n</think>\n\n")
    for _ in range(dice.choice((0, 0, 1, 1, 2)) if chat else 0):
        city = "".join(dice.choices(["Wien", "上海", "é", " ", "🙂", '\\"', "}"], k=3))
        call = dice.choice(
            (f'{{"name": "weather", "arguments": {{"city": "{city}"}}}}', '{"name": "add", "arguments": {"a": 1}}')
        )
        parts.append(f"<tool_call>\n{call}\n</tool_call>" + dice.choice(("", "\n", TEXTS[0])))
    ids = core.tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    if dice.random() < 0.3:
        at = dice.randrange(len(ids) + 1)
        ids[at:at] = [dice.randrange(len(core.tokenizer)) for _ in range(dice.randint(1, 12))]
    return [*ids, core.eos]


def sampling(dice: random.Random, core: Core) -> lm.Sampling:
    made = lm.Sampling(temperature=0, include_stop=dice.random() < 0.3, ignore_eos=dice.random() < 0.2)
    text = core.tokenizer.decode(core.script)
    for _ in range(dice.choice((0, 1, 1, 2))):
        at = dice.randrange(len(text))
        if stop := text[at : at + dice.randint(1, 9)]:
            made.stop.append(stop)
    if dice.random() < 0.3:
        made.max_tokens = dice.randint(1, len(core.script) + 5)
    elif made.ignore_eos:
        made.max_tokens = len(core.script) + 5
    if dice.random() < 0.3:
        made.min_tokens = dice.randint(0, made.max_tokens or len(core.script))
    if dice.random() < 0.2:
        made.stop_token_ids.append(dice.choice(core.script))
    return made


async def hear(stream: AsyncIterator[Event], dice: random.Random, into: Transcript, events: int | None) -> bool:
    """Reads so many events, or all; merges some, as an instance does on its way out. Returns whether it came to its
    end."""
    held: Event | None = None
    try:
        async for event in stream:
            if held is None:
                held = event
            else:
                merge(held, event)
            if held.usage is None and dice.random() < 0.2:
                continue
            into.take(held)
            if held.usage is not None:
                return True
            held = None
            if events is not None and (events := events - 1) <= 0:
                return False
        raise AssertionError("an answer without its usage")
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


async def main(folder: str, seams: int, seed: int) -> dict[str, Any]:
    dice = random.Random(seed)
    core = Core(folder, dice)
    engines = {True: engine_on(core, parsers=True), False: engine_on(core, parsers=False)}
    done, answers, wrong, kinds = (
        0,
        0,
        [],
        {"chat": 0, "complete": 0, "calls": 0, "thoughts": 0, "stopped": 0, "cut": 0},
    )
    while done < seams:
        chat = dice.random() < 0.7
        core.script, core.prompt = script(dice, core, chat=chat), 0
        asked: Any
        if chat:
            tools = TOOLS if dice.random() < 0.8 else []
            asked = lm.ChatRequest(messages=[lm.Message(role=lm.ROLE_USER, content="hé")], tools=tools)
        else:
            asked = lm.CompleteRequest(text="The café — 用", echo=dice.random() < 0.3)
        asked.sampling.CopyFrom(sampling(dice, core))
        engine = engines[chat]
        run = engine.chat if chat else engine.complete
        whole = Transcript()
        await hear(run(asked), dice, whole, None)
        answers += 1
        kinds["chat" if chat else "complete"] += 1
        kinds["calls"] += bool(whole.calls)
        kinds["thoughts"] += bool(whole.reasoning)
        kinds["stopped"] += bool(whole.ends[0][1])
        for _ in range(8):
            broken, pieces = Transcript(), []
            ended, left = False, dice.randint(1, 3)
            while not ended:
                stop_after = dice.randint(1, max(1, len(core.script) // 2)) if left else None
                left -= 1
                asked.relay.resume.token_ids[:] = broken.ids
                pieces.append(len(broken.ids))
                ended = await hear(run(asked), dice, broken, stop_after)
                if not ended:
                    done += 1
            asked.relay.ClearField("resume")
            kinds["cut"] += len(pieces) > 1
            if broken.seen() != whole.seen():
                said = {
                    name: (value, broken.seen()[name])
                    for name, value in whole.seen().items()
                    if broken.seen()[name] != value
                }
                wrong.append(
                    {
                        "seams": pieces,
                        "request": str(asked)[:600],
                        "script": core.tokenizer.decode(core.script),
                        "differs": said,
                    }
                )
    return {"seams": done, "answers": answers, "kinds": kinds, "wrong": len(wrong), "first": wrong[:2]}


if __name__ == "__main__":
    told = asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 7))
    print(json.dumps(told, ensure_ascii=False, indent=1, default=str))
