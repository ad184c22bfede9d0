"""The LLM service on real vLLM, against vLLM itself and against what the contract promises."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from infermesh.errors import MeshError, Reason, from_rpc
from infermesh.transport import channel_options
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc, worker_pb2_grpc
from infermesh.v1.inference_pb2 import Relay, Resume, TokenIds, Usage
from infermesh.v1.worker_pb2 import DescribeRequest, Load
from tests.kit.llm import BLOCK, CONTEXT, MODEL, llm_python

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]
REFERENCE = Path(__file__).resolve().parents[1] / "kit" / "vllm_reference.py"
PROMPTS = ["What is the weather", "Once upon a time there was", "def add(a, b):", "用户问:今天", "The answer is 4"]
QUESTIONS = ["Hi there", "Name a city.", "今天天气怎么样?"]
TOKENS = 96
GREEDY = {"temperature": 0, "ignore_eos": True}
WEATHER = lm.Tool(
    name="get_weather",
    description="The weather of a city",
    parameters_json=json.dumps(
        {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
    ),
)
NO_THINKING = '{"enable_thinking": false}'


class Answer:
    """A stream, read to its end."""

    def __init__(self, events: Iterable[Any]) -> None:
        self.events = list(events)
        self.deltas = [delta for event in self.events for delta in event.deltas]
        self.usage: Usage = self.events[-1].usage
        self.started: lm.Started = self.events[0].started

    def ids(self, choice: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.choice == choice for token in delta.token_ids]

    def text(self, choice: int = 0) -> str:
        return "".join(delta.content for delta in self.deltas if delta.choice == choice)

    def reasoning(self) -> str:
        return "".join(delta.reasoning for delta in self.deltas)

    def finish(self, choice: int = 0) -> lm.Finish:
        (finish,) = [delta.finish for delta in self.deltas if delta.choice == choice and delta.finish]
        return finish

    def calls(self) -> dict[int, tuple[str, str]]:
        found: dict[int, tuple[str, str]] = {}
        for call in (call for delta in self.deltas for call in delta.tool_calls):
            name, arguments = found.get(call.index, ("", ""))
            found[call.index] = (name + call.name, arguments + call.arguments_json)
        return found


class Client:
    def __init__(self, channel: Any) -> None:
        self.stub = language_model_pb2_grpc.LanguageModelServiceStub(channel)
        self.worker = worker_pb2_grpc.WorkerServiceStub(channel)

    async def complete(self, text: str = "", **fields: Any) -> Answer:
        request = lm.CompleteRequest(model=MODEL, text=text or None, relay=fields.pop("relay", Relay()), **fields)
        return Answer([event async for event in self.stub.Complete(request)])

    async def chat(self, text: str = "Hi", **fields: Any) -> Answer:
        messages = fields.pop("messages", None) or [lm.Message(role=lm.ROLE_USER, content=text)]
        request = lm.ChatRequest(model=MODEL, messages=messages, relay=fields.pop("relay", Relay()), **fields)
        return Answer([event async for event in self.stub.Chat(request)])

    async def refused(self, call: Any) -> MeshError:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        return from_rpc(refused.value)

    async def load(self) -> Load:
        return (await self.worker.Describe(DescribeRequest())).load


@pytest.fixture
async def service(vllm_service: str) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(vllm_service, options=channel_options()) as channel:
        yield Client(channel)


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> dict[str, Any]:
    asked = {
        "model": str(tiny_model),
        "max_model_len": CONTEXT,
        "block_size": BLOCK,
        "max_tokens": TOKENS,
        "prompts": PROMPTS,
        "chats": [[{"role": "user", "content": question}] for question in QUESTIONS],
    }
    return json.loads(llm_python(str(REFERENCE), input=json.dumps(asked)).strip().splitlines()[-1])


async def test_greedy_completion_equals_vllm_offline(service: Client, reference: dict[str, Any]) -> None:
    for prompt, ids, text in zip(PROMPTS, reference["prompts"], reference["texts"], strict=True):
        answer = await service.complete(prompt, sampling=lm.Sampling(max_tokens=TOKENS, **GREEDY))
        assert answer.ids() == ids
        assert answer.text() == text
        assert len(ids) == TOKENS and len(set(ids)) >= 30, "a model that repeats itself would prove nothing"
        assert answer.usage.completion_tokens == TOKENS
        assert answer.finish() == lm.FINISH_LENGTH


async def test_greedy_chat_equals_vllm_offline(service: Client, reference: dict[str, Any]) -> None:
    for question, ids in zip(QUESTIONS, reference["chats"], strict=True):
        answer = await service.chat(question, sampling=lm.Sampling(max_tokens=TOKENS, **GREEDY))
        assert answer.ids() == ids and len(set(ids)) >= 30


async def test_token_ids_continue_like_their_text(service: Client, reference: dict[str, Any]) -> None:
    prompt = (await service.stub.Tokenize(lm.TokenizeRequest(model=MODEL, text=PROMPTS[0]))).token_ids
    whole = reference["prompts"][0]
    answer = await service.complete(
        token_ids=TokenIds(ids=[*prompt, *whole[:40]]), sampling=lm.Sampling(max_tokens=TOKENS - 40, **GREEDY)
    )
    assert answer.ids() == whole[40:]


async def test_one_event_an_engine_step(service: Client) -> None:
    answer = await service.complete("Once", sampling=lm.Sampling(max_tokens=20, **GREEDY))
    assert 10 <= len(answer.events) <= 20  # fewer only where the reader was slower than the engine
    assert answer.started.prompt_tokens == 1 and answer.started.model == MODEL
    assert all(not event.HasField("started") for event in answer.events[1:])
    assert all(not event.HasField("usage") for event in answer.events[:-1])


async def test_a_shared_prefix_is_cached_but_not_across_tenants(service: Client) -> None:
    document = "The gateway counts tokens, not requests. " * 150
    sampling = lm.Sampling(max_tokens=4, **GREEDY)
    first = await service.complete(document + "What is the weather?", sampling=sampling)
    second = await service.complete(document + "Name a city.", sampling=sampling)
    assert first.usage.cached_tokens == 0
    assert first.usage.prompt_tokens > 1000
    assert second.usage.cached_tokens >= 1000 - BLOCK
    assert second.started.cached_tokens == second.usage.cached_tokens
    other = await service.complete(document + "Name a city.", sampling=sampling, relay=Relay(cache_salt=b"acme"))
    assert other.usage.cached_tokens == 0
    again = await service.complete(document + "Name a city.", sampling=sampling, relay=Relay(cache_salt=b"acme"))
    assert again.usage.cached_tokens >= 1000 - BLOCK
    assert again.ids() == second.ids()


async def test_a_hundred_vanished_clients_leave_nothing(service: Client) -> None:
    sampling = lm.Sampling(max_tokens=3500, ignore_eos=True)
    calls = [service.stub.Complete(lm.CompleteRequest(model=MODEL, text=f"{i}", sampling=sampling)) for i in range(100)]
    await asyncio.gather(*(call.read() for call in calls))
    for _ in range(50):
        load = await service.load()
        if load.running == 100:
            break
        await asyncio.sleep(0.02)
    assert load.running == 100 and load.kv_used_ratio > 0 and load.resident_tokens > 0
    for call in calls:
        call.cancel()
    await asyncio.sleep(1)
    load = await service.load()
    assert (load.running, load.waiting, load.kv_used_ratio, load.resident_tokens) == (0, 0, 0, 0)
    steps = load.steps
    await asyncio.sleep(0.3)
    assert (await service.load()).steps == steps, "the engine still computes for nobody"


async def test_a_deadline_reaches_the_engine(service: Client) -> None:
    request = lm.CompleteRequest(model=MODEL, text="x", sampling=lm.Sampling(max_tokens=4000, ignore_eos=True))
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in service.stub.Complete(request, timeout=0.3):
            pass
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(1)
    assert (await service.load()).running == 0


async def test_stop_strings(service: Client, reference: dict[str, Any]) -> None:
    whole = reference["texts"][0]
    stop = next(whole[at : at + 3] for at in range(20, 60) if whole[at : at + 3].isascii())
    cut = whole[: whole.index(stop)]
    sampling = lm.Sampling(max_tokens=TOKENS, stop=[stop, "never there"], **GREEDY)
    answer = await service.complete(PROMPTS[0], sampling=sampling)
    assert answer.text() == cut
    assert answer.finish() == lm.FINISH_STOP and answer.deltas[-1].stop_text == stop
    sampling.include_stop = True
    assert (await service.complete(PROMPTS[0], sampling=sampling)).text() == cut + stop


async def test_stop_tokens(service: Client, reference: dict[str, Any]) -> None:
    ids = reference["prompts"][0]
    token = next(token for at, token in enumerate(ids) if at >= 10 and token not in ids[:at])
    answer = await service.complete(
        PROMPTS[0], sampling=lm.Sampling(max_tokens=TOKENS, stop_token_ids=[token], **GREEDY)
    )
    assert answer.ids() == ids[: ids.index(token) + 1]
    assert answer.finish() == lm.FINISH_STOP and answer.deltas[-1].stop_token == token


async def test_seed_and_n(service: Client) -> None:
    sampling = lm.Sampling(max_tokens=24, n=2, seed=7, temperature=1, ignore_eos=True)
    first, second = await service.complete("Once", sampling=sampling), await service.complete("Once", sampling=sampling)
    assert first.ids(0) != first.ids(1)
    assert [first.ids(0), first.ids(1)] == [second.ids(0), second.ids(1)]
    assert first.usage.completion_tokens == 48
    assert {first.finish(0), first.finish(1)} == {lm.FINISH_LENGTH}
    assert sum(event.HasField("usage") for event in first.events) == 1


async def test_logprobs(service: Client) -> None:
    sampling = lm.Sampling(max_tokens=12, logprobs=5, prompt_logprobs=2, **GREEDY)
    answer = await service.complete("Once upon a time", sampling=sampling)
    lines = [line for delta in answer.deltas for line in delta.logprobs]
    assert [line.token_id for line in lines] == answer.ids()
    for line in lines:
        assert len(line.top) == 5 and line.top[0].rank == 1
        assert line.logprob == line.top[0].logprob <= 0  # which of two equal ones was taken is not said
        assert [top.logprob for top in line.top] == sorted((top.logprob for top in line.top), reverse=True)
    spelled = b"".join(line.token_bytes for line in lines).decode(errors="replace")
    assert spelled.removesuffix("\ufffd") == answer.text().removesuffix("\ufffd")  # half a character may end it
    positions = answer.started.prompt_logprobs
    prompt = (await service.stub.Tokenize(lm.TokenizeRequest(model=MODEL, text="Once upon a time"))).token_ids
    assert [position.candidates[0].token_id for position in positions] == list(prompt[1:])
    # The chance of a whole is the product of its tokens' chances: prompt + answer scored at once gives the same.
    scored = await service.complete(
        token_ids=TokenIds(ids=[*prompt, *answer.ids()]), sampling=lm.Sampling(max_tokens=1, prompt_logprobs=0)
    )
    later = [position.candidates[0].logprob for position in scored.started.prompt_logprobs[len(prompt) - 1 :]]
    assert sum(later) == pytest.approx(sum(line.logprob for line in lines), abs=0.3)  # bfloat16


async def test_all_logprobs_without_alternatives(service: Client) -> None:
    answer = await service.complete("Once", sampling=lm.Sampling(max_tokens=5, logprobs=0, **GREEDY))
    assert [len(line.top) for delta in answer.deltas for line in delta.logprobs] == [0] * 5


async def test_echo(service: Client) -> None:
    answer = await service.complete("Once upon", echo=True, sampling=lm.Sampling(max_tokens=3, logprobs=1, **GREEDY))
    plain = await service.complete("Once upon", sampling=lm.Sampling(max_tokens=3, **GREEDY))
    assert answer.text() == "Once upon" + plain.text() and answer.ids() == plain.ids()
    assert len(answer.started.prompt_logprobs) == answer.started.prompt_tokens - 1


async def test_min_and_max_tokens(service: Client, reference: dict[str, Any]) -> None:
    ids = reference["prompts"][0]
    stop = ids[5]
    answer = await service.complete(
        PROMPTS[0], sampling=lm.Sampling(max_tokens=40, min_tokens=20, stop_token_ids=[stop], temperature=0)
    )
    assert 20 <= len(answer.ids()) <= 40 and stop not in answer.ids()[:19]
    one = await service.complete(PROMPTS[0], sampling=lm.Sampling(max_tokens=1, temperature=0))
    assert one.ids() == ids[:1] and one.finish() == lm.FINISH_LENGTH


async def test_without_max_tokens_the_context_is_the_bound(service: Client) -> None:
    ids = list(range(256, 512)) * 15 + [300] * 200
    answer = await service.complete(token_ids=TokenIds(ids=ids), sampling=lm.Sampling(**GREEDY))
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == CONTEXT
    assert answer.finish() == lm.FINISH_LENGTH


async def test_penalties_and_bias_are_obeyed(service: Client, reference: dict[str, Any]) -> None:
    whole = reference["prompts"][0]
    first = whole[0]
    barred = await service.complete(PROMPTS[0], sampling=lm.Sampling(max_tokens=8, logit_bias={first: -100}, **GREEDY))
    forced = await service.complete(PROMPTS[0], sampling=lm.Sampling(max_tokens=8, logit_bias={first: 100}, **GREEDY))
    assert first not in barred.ids() and forced.ids() == [first] * 8
    penalised = await service.complete(
        PROMPTS[0], sampling=lm.Sampling(max_tokens=TOKENS, frequency_penalty=2, presence_penalty=2, **GREEDY)
    )
    assert len(set(penalised.ids())) > len(set(whole))


async def test_regex(service: Client) -> None:
    answer = await service.complete(
        "x", sampling=lm.Sampling(max_tokens=40), constraint=lm.Constraint(regex="[0-9]{3}-[a-z]{4}")
    )
    assert re.fullmatch("[0-9]{3}-[a-z]{4}", answer.text()) and answer.finish() == lm.FINISH_STOP


async def test_choice_and_grammar(service: Client) -> None:
    for _ in range(3):
        choice = lm.Constraint(choice=lm.Choice(choices=["red", "green", "blue"]))
        assert (await service.complete("x", constraint=choice)).text() in ("red", "green", "blue")
        grammar = lm.Constraint(grammar='root ::= "yes " ("a" | "b")')
        assert (await service.complete("x", constraint=grammar)).text() in ("yes a", "yes b")


async def test_json(service: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["x", "y"]}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    answer = await service.complete("x", constraint=lm.Constraint(json_schema=json.dumps(schema)))
    value = json.loads(answer.text())
    assert value["name"] in ("x", "y") and isinstance(value["ok"], bool) and set(value) == {"name", "ok"}
    assert " " not in answer.text()
    free = await service.complete(
        "x", sampling=lm.Sampling(max_tokens=600, seed=1), constraint=lm.Constraint(json_object=True)
    )
    assert free.text().startswith("{") and (free.finish() == lm.FINISH_LENGTH or json.loads(free.text()) is not None)


async def test_a_constraint_waits_for_the_end_of_reasoning(service: Client) -> None:
    choice = lm.Constraint(choice=lm.Choice(choices=["red", "green"]))
    answer = await service.chat(constraint=choice, template_args_json=NO_THINKING)
    assert answer.text() in ("red", "green") and answer.reasoning() == ""


@pytest.mark.parametrize(
    ("constraint", "param"),
    [
        (lm.Constraint(json_schema='{"type": "nonsense"}'), "constraint.json_schema"),
        (lm.Constraint(regex="[0-9"), "constraint.regex"),
        (lm.Constraint(grammar="root ::= ("), "constraint.grammar"),
        (lm.Constraint(structural_tag='{"no": "tag"}'), "constraint.structural_tag"),
    ],
)
async def test_an_impossible_constraint_is_named(service: Client, constraint: lm.Constraint, param: str) -> None:
    error = await service.refused(service.complete("x", constraint=constraint))
    assert (error.reason, error.param) == (Reason.INVALID_ARGUMENT, param)


async def test_a_prompt_over_the_context_is_counted(service: Client) -> None:
    error = await service.refused(service.complete(token_ids=TokenIds(ids=[300] * 5000)))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED and "5000" in error.message and str(CONTEXT) in error.message
    error = await service.refused(service.complete("The weather " * 3000))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    (count,) = re.findall(r"has (\d+) tokens", error.message)
    assert int(count) > CONTEXT + 1, "counted, not cut off"
    error = await service.refused(service.chat("weather " * 40_000))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"sampling": lm.Sampling(stop_token_ids=[5000])}, Reason.INVALID_ARGUMENT, "sampling.stop_token_ids"),
        ({"sampling": lm.Sampling(logit_bias={9999: 1})}, Reason.INVALID_ARGUMENT, "sampling.logit_bias"),
        ({"relay": Relay(resume=Resume(token_ids=[1]))}, Reason.UNSUPPORTED, "relay.resume"),
        ({"sampling": lm.Sampling(max_tokens=-1)}, Reason.INVALID_ARGUMENT, "sampling.max_tokens"),
        ({"sampling": lm.Sampling(max_tokens=2**62)}, Reason.INVALID_ARGUMENT, "sampling.max_tokens"),
        ({"sampling": lm.Sampling(n=16384)}, Reason.INVALID_ARGUMENT, "sampling.n"),
        ({"lora": "a"}, Reason.UNSUPPORTED, "lora"),
    ],
)
async def test_bad_fields_are_named(service: Client, fields: dict[str, Any], reason: Reason, param: str) -> None:
    error = await service.refused(service.complete("x", **fields))
    assert (error.reason, error.param) == (reason, param)


async def test_unknown_token_ids_are_refused(service: Client) -> None:
    error = await service.refused(service.complete(token_ids=TokenIds(ids=[1, 70_000])))
    assert error.reason is Reason.INVALID_ARGUMENT and error.param == "prompt"


@pytest.mark.parametrize("arguments", ['{"chat_template": "x"}', '{"tokenize": true}', '{"strftime_now": 1}'])
async def test_template_arguments_that_are_ours(service: Client, arguments: str) -> None:
    error = await service.refused(service.chat(template_args_json=arguments))
    assert (error.reason, error.param) == (Reason.INVALID_ARGUMENT, "template_args_json")


async def test_the_template_renders_roles_tools_and_arguments(service: Client) -> None:
    conversation = lm.Conversation(
        messages=[
            lm.Message(role=lm.ROLE_DEVELOPER, content="Be brief."),
            lm.Message(role=lm.ROLE_USER, parts=[lm.ContentPart(text="Weather in "), lm.ContentPart(text="Paris?")]),
            lm.Message(
                role=lm.ROLE_ASSISTANT,
                tool_calls=[lm.ToolCall(id="1", name="get_weather", arguments_json='{"city": "Paris"}')],
            ),
            lm.Message(role=lm.ROLE_TOOL, content="mild", tool_call_id="1"),
        ],
        tools=[WEATHER],
        template_args_json=NO_THINKING,
    )
    reply = await service.stub.Tokenize(lm.TokenizeRequest(model=MODEL, chat=conversation))
    text = "".join(reply.tokens)
    assert text.startswith("<|im_start|>system\nBe brief.") and '"name": "get_weather"' in text
    assert "<|im_start|>user\nWeather in \nParis?<|im_end|>" in text or "Weather in Paris?" in text
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in text
    assert "<tool_response>\nmild\n</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert reply.max_context == CONTEXT and reply.model == MODEL
    back = await service.stub.Detokenize(lm.DetokenizeRequest(model=MODEL, token_ids=reply.token_ids))
    assert back.text == text


async def test_a_message_is_continued(service: Client) -> None:
    messages = [
        lm.Message(role=lm.ROLE_USER, content="Tell me"),
        lm.Message(role=lm.ROLE_ASSISTANT, content="</think>Once upon a"),
    ]
    answer = await service.chat(
        messages=messages, continue_final_message=True, sampling=lm.Sampling(max_tokens=8, **GREEDY)
    )
    same = await service.complete(
        "<|im_start|>user\nTell me<|im_end|>\n<|im_start|>assistant\n</think>Once upon a",
        sampling=lm.Sampling(max_tokens=8, **GREEDY),
    )
    assert answer.ids() == same.ids() and answer.usage.prompt_tokens == same.usage.prompt_tokens


async def test_reasoning_is_told_apart(service: Client) -> None:
    shape = lm.Constraint(regex="hello")
    answer = await service.chat(constraint=shape, sampling=lm.Sampling(max_tokens=1500, logit_bias=await _end(service)))
    assert answer.text() == "hello"
    assert answer.reasoning() and "</think>" not in answer.reasoning()
    assert 0 < answer.usage.reasoning_tokens < answer.usage.completion_tokens


async def _end(service: Client) -> dict[int, float]:
    """Makes noise come to the end of its reasoning."""
    reply = await service.stub.Tokenize(lm.TokenizeRequest(model=MODEL, text="</think>"))
    (token,) = reply.token_ids
    return {token: 8.0}


async def test_a_required_tool_call(service: Client) -> None:
    answer = await service.chat(
        tools=[WEATHER],
        tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_REQUIRED, parallel=False),
        template_args_json=NO_THINKING,
        sampling=lm.Sampling(max_tokens=3000),
    )
    assert list(answer.calls()) == [0]
    name, arguments = answer.calls()[0]
    assert name == "get_weather" and json.loads(arguments)["city"] in ("Paris", "Rome")
    assert answer.finish() == lm.FINISH_TOOL_CALLS and answer.text().strip() == ""


async def test_a_named_tool_call(service: Client) -> None:
    answer = await service.chat(
        tools=[WEATHER],
        tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_FUNCTION, function="get_weather"),
        template_args_json=NO_THINKING,
        sampling=lm.Sampling(max_tokens=3000),
    )
    name, arguments = answer.calls()[0]
    assert name == "get_weather" and json.loads(arguments)["city"] in ("Paris", "Rome")
    assert answer.finish() == lm.FINISH_STOP
    ids = [call.id for delta in answer.deltas for call in delta.tool_calls if call.id]
    assert len(ids) == len(answer.calls()) == 1


async def test_auto_finds_the_call_in_the_text(service: Client) -> None:
    begin = "<tool_call>"
    start = (await service.stub.Tokenize(lm.TokenizeRequest(model=MODEL, text=begin))).token_ids[0]
    answer = await service.chat(
        tools=[WEATHER],
        template_args_json=NO_THINKING,
        sampling=lm.Sampling(max_tokens=3000, logit_bias={start: 100}),
        tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_AUTO, parallel=False),
    )
    assert answer.calls()[0][0] == "get_weather" and begin not in answer.text()


async def test_none_leaves_the_text_alone(service: Client) -> None:
    answer = await service.chat(
        tools=[WEATHER],
        tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_NONE),
        template_args_json=NO_THINKING,
        constraint=lm.Constraint(choice=lm.Choice(choices=['<tool_call>{"name": "get_weather"}</tool_call>'])),
    )
    assert not answer.calls() and answer.text().startswith("<tool_call>")


async def test_a_forced_call_excludes_a_constraint(service: Client) -> None:
    error = await service.refused(
        service.chat(
            tools=[WEATHER],
            tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_REQUIRED),
            constraint=lm.Constraint(regex="a"),
        )
    )
    assert (error.reason, error.param) == (Reason.UNSUPPORTED, "constraint")


async def test_it_describes_itself(service: Client) -> None:
    told = (await service.worker.Describe(DescribeRequest())).metadata
    assert told["engine"] == "vllm" and told["device"] == "cpu" and told["dtype"] == "bfloat16"
    assert (told["context_max"], told["max_running"], told["kv_block"]) == (str(CONTEXT), "128", str(BLOCK))
    assert int(told["kv_tokens"]) > 100_000
    assert {"tools", "reasoning", "json_schema", "n", "logprobs", "token_ids"} <= set(told["features"].split(","))
    assert all(len(told[name]) == 16 for name in ("weights_version", "tokenizer_digest", "template_digest"))
