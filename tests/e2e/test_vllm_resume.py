"""Streams that a real vLLM began and another one ends: greedy answers equal the unbroken ones, sampled ones parse."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from infermesh.errors import Reason, from_rpc
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Relay, Resume
from services.llm.tiny_model import MARKERS, SPECIAL
from tests.kit.llm import LlmProcess, llm_python
from tests.kit.llm_client import GREEDY, MODEL, Answer, Client
from tests.kit.mesh import running_mesh, until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(400)]
SEAMS = Path(__file__).resolve().parents[1] / "kit" / "replay_seams.py"
QUESTIONS = ["Hi there", "Name a city.", "今天天气怎么样?", "naïve café 🙂", "def add(a, b):", "What is the weather"]
TOKENS = 160
LONG = 600
TOOL = lm.Tool(name="weather", parameters_json='{"type":"object","properties":{"city":{"type":"string"}}}')


def test_replay_has_no_seam_whatever_the_text(tiny_model: Path) -> None:
    """1,000 random kill points on transcripts of our own; `make seams` runs 10,000."""
    told = json.loads(_json(llm_python("-P", str(SEAMS), str(tiny_model), "1000", "11", timeout_s=300)))
    assert told["wrong"] == 0, told["first"]
    kinds = told["kinds"]
    assert told["seams"] >= 1000 and min(kinds.values()) > 0 and kinds["cut"] > 500


def _json(output: str) -> str:
    return output[output.index("{\n") :]


async def go_on(vllm: Client, asked: Any, whole: Answer, cut: int) -> None:
    """The rest after the first `cut` events joins them into the whole, as if nothing had happened."""
    before = Answer(whole.events[:cut])
    resume = Resume(token_ids=before.ids(), response_id="same", created=5)
    after = await vllm.chat(relay=Relay(resume=resume), **asked)
    for part in (Answer.ids, Answer.text, Answer.reasoning):
        assert part(before) + part(after) == part(whole), (cut, part)
    lines = [line for answer in (before, after) for delta in answer.deltas for line in delta.logprobs]
    wanted = [line for delta in whole.deltas for line in delta.logprobs]
    assert [(line.token_id, line.token, line.token_bytes) for line in lines] == [
        (line.token_id, line.token, line.token_bytes) for line in wanted
    ]
    assert (after.started.id, after.started.created, after.finish()) == ("same", 5, whole.finish())
    usage = after.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
        whole.usage.reasoning_tokens,
    )


async def test_greedy_answers_go_on_exactly(vllm: Client) -> None:
    dice = random.Random(5)
    for question in QUESTIONS:
        sampling = lm.Sampling(max_tokens=TOKENS, logprobs=2, **GREEDY)
        plain = await vllm.chat(question, sampling=sampling)
        said = plain.reasoning() or plain.text()
        sampling.stop.append(said[len(said) // 2 :][:7])
        sampling.min_tokens = dice.randrange(40)
        asked = {"text": question, "sampling": sampling, "tools": [TOOL] if dice.random() < 0.5 else []}
        whole = await vllm.chat(**asked)
        assert len(whole.ids()) > 10
        for _ in range(5):
            await go_on(vllm, asked, whole, dice.randint(1, len(whole.events) - 1))


async def test_what_was_never_said_is_no_stream_to_resume(vllm: Client) -> None:
    for resume, sampling in ((Resume(token_ids=[10**6]), {}), (Resume(token_ids=[1] * 9), {"max_tokens": 8})):
        call = vllm.stub.Chat(_question("hi", relay=Relay(resume=resume), sampling=lm.Sampling(**sampling)))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in call:
                pass
        assert from_rpc(refused.value).reason is Reason.INVALID_ARGUMENT


def _question(text: str, **fields: Any) -> lm.ChatRequest:
    return lm.ChatRequest(model=MODEL, messages=[lm.Message(role=lm.ROLE_USER, content=text)], **fields)


async def _events(stub: Any, asked: lm.ChatRequest, far: list[str] | None = None) -> tuple[Answer, dict[str, str]]:
    """`far` learns which instance answers, once a third of the answer has come."""
    call = stub.Chat(asked)
    events, tokens = [], 0
    async for event in call:
        events.append(event)
        tokens += sum(len(delta.token_ids) for delta in event.deltas)
        if far is not None and tokens > LONG // 3:
            far.append(events[0].started.instance_id)
            far = None
    return Answer(events), dict(await call.trailing_metadata())


async def test_a_killed_instance_is_not_noticed(tiny_model: Path, tmp_path: Path) -> None:
    """Two real instances behind a gateway, twelve streams, SIGKILL."""
    async with two_instances(tiny_model, tmp_path) as (mesh, processes):
        greedy = [_question(text, sampling=lm.Sampling(max_tokens=LONG, **GREEDY)) for text in QUESTIONS]
        calm = [await _events(mesh.llm, asked) for asked in greedy]
        sampled = []
        for seed, text in enumerate(QUESTIONS):
            sampling = lm.Sampling(max_tokens=LONG, temperature=0.8, seed=seed, ignore_eos=True)
            sampled.append(_question(text, sampling=sampling, tools=[TOOL]))
        far: list[str] = []
        running = [asyncio.create_task(_events(mesh.llm, asked, far)) for asked in [*greedy, *sampled]]
        await until(lambda: far, 60)
        processes[far[0]].process.kill()
        answers = await asyncio.gather(*running)
        moved = [trailers for _, trailers in answers if "x-infermesh-resumes" in trailers]
        print(f"{len(moved)} of {len(answers)} streams moved")
        assert moved, "the one that was killed had nothing"
        for (answer, trailers), (unbroken, _) in zip(answers, calm, strict=False):
            assert answer.ids() == unbroken.ids()
            assert (answer.text(), answer.reasoning()) == (unbroken.text(), unbroken.reasoning())
            assert trailers.get("x-infermesh-resume-exact", "true") == "true"
        for answer, _ in answers:
            assert answer.usage.completion_tokens == len(answer.ids()) == LONG
        for answer, trailers in answers[len(greedy) :]:
            assert trailers.get("x-infermesh-resume-exact", "false") == "false"
            whole = (await mesh.llm.Detokenize(lm.DetokenizeRequest(model=MODEL, token_ids=answer.ids()))).text
            if "x-infermesh-resumes" not in trailers:  # else the grammar of a call may have been lost with its instance
                assert all(json.loads(call)["name"] == "weather" for call in _closed(whole))
            assert _in_order(whole, [answer.reasoning(), answer.text(), *(text for _, text in answer.calls().values())])


def _closed(whole: str) -> list[str]:
    """The tool calls that came to their end."""
    return [part.partition("</tool_call>")[0] for part in whole.split("<tool_call>")[1:] if "</tool_call>" in part]


def _in_order(whole: str, parts: list[str]) -> bool:
    """Whether the parts are what the ids say, each once and in this order. Parsers take markers out, and bytes that
    make no character are shown one by one or together, as they come."""
    whole, at = _bare(whole), 0
    for part in map(_bare, parts):
        found = whole.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def _bare(text: str) -> str:
    for mark in (*SPECIAL, *MARKERS, "\ufffd"):
        text = text.replace(mark, "")
    return "".join(text.split())


class two_instances:
    """A gateway in this loop, and two vLLM services as processes that register with it."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._processes: dict[str, LlmProcess] = {}
        self._mesh: Any = None

    async def __aenter__(self) -> tuple[Any, dict[str, LlmProcess]]:
        self._mesh = running_mesh(self._folder, {}, model=MODEL)
        mesh = await self._mesh.__aenter__()
        flags = ("--tool-parser", "hermes", "--reasoning-parser", "qwen3", "--registry", mesh.registry)
        for name in ("one", "two"):
            folder = self._folder / name
            folder.mkdir()
            self._processes[name] = LlmProcess(folder, self._model, "--instance-id", name, *flags)
        for process in self._processes.values():
            await asyncio.to_thread(process.wait_ready)
        await mesh.healthy("one", "two")
        return mesh, self._processes

    async def __aexit__(self, *error: Any) -> None:
        for process in self._processes.values():
            await asyncio.to_thread(process.close)
        await self._mesh.__aexit__(*error)
