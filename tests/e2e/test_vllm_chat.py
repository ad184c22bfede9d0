"""Constraints, chat templates, reasoning and tool calls of the LLM service on real vLLM."""

from __future__ import annotations

import json
import re

import pytest

from infermesh.errors import Reason
from infermesh.v1 import language_model_pb2 as lm
from tests.kit.llm import CONTEXT
from tests.kit.llm_client import GREEDY, MODEL, Client

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]
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


async def test_regex(vllm: Client) -> None:
    answer = await vllm.complete(
        "x", sampling=lm.Sampling(max_tokens=40), constraint=lm.Constraint(regex="[0-9]{3}-[a-z]{4}")
    )
    assert re.fullmatch("[0-9]{3}-[a-z]{4}", answer.text()) and answer.finish() == lm.FINISH_STOP


async def test_choice_and_grammar(vllm: Client) -> None:
    for _ in range(3):
        choice = lm.Constraint(choice=lm.Choice(choices=["red", "green", "blue"]))
        assert (await vllm.complete("x", constraint=choice)).text() in ("red", "green", "blue")
        grammar = lm.Constraint(grammar='root ::= "yes " ("a" | "b")')
        assert (await vllm.complete("x", constraint=grammar)).text() in ("yes a", "yes b")


async def test_json(vllm: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["x", "y"]}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    answer = await vllm.complete("x", constraint=lm.Constraint(json_schema=json.dumps(schema)))
    value = json.loads(answer.text())
    assert value["name"] in ("x", "y") and isinstance(value["ok"], bool) and set(value) == {"name", "ok"}
    assert " " not in answer.text()
    free = await vllm.complete(
        "x", sampling=lm.Sampling(max_tokens=600, seed=1), constraint=lm.Constraint(json_object=True)
    )
    assert free.text().startswith("{") and (free.finish() == lm.FINISH_LENGTH or json.loads(free.text()) is not None)


async def test_a_constraint_waits_for_the_end_of_reasoning(vllm: Client) -> None:
    choice = lm.Constraint(choice=lm.Choice(choices=["red", "green"]))
    answer = await vllm.chat(constraint=choice, template_args_json=NO_THINKING)
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
async def test_an_impossible_constraint_is_named(vllm: Client, constraint: lm.Constraint, param: str) -> None:
    error = await vllm.refused(vllm.complete("x", constraint=constraint))
    assert (error.reason, error.param) == (Reason.INVALID_ARGUMENT, param)


@pytest.mark.parametrize("arguments", ['{"chat_template": "x"}', '{"tokenize": true}', '{"strftime_now": 1}'])
async def test_template_arguments_that_are_ours(vllm: Client, arguments: str) -> None:
    error = await vllm.refused(vllm.chat(template_args_json=arguments))
    assert (error.reason, error.param) == (Reason.INVALID_ARGUMENT, "template_args_json")


async def test_the_template_renders_roles_tools_and_arguments(vllm: Client) -> None:
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
    reply = await vllm.stub.Tokenize(lm.TokenizeRequest(model=MODEL, chat=conversation))
    text = "".join(reply.tokens)
    assert text.startswith("<|im_start|>system\nBe brief.") and '"name": "get_weather"' in text
    assert "<|im_start|>user\nWeather in \nParis?<|im_end|>" in text or "Weather in Paris?" in text
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in text
    assert "<tool_response>\nmild\n</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert reply.max_context == CONTEXT and reply.model == MODEL
    back = await vllm.stub.Detokenize(lm.DetokenizeRequest(model=MODEL, token_ids=reply.token_ids))
    assert back.text == text


async def test_a_message_is_continued(vllm: Client) -> None:
    messages = [
        lm.Message(role=lm.ROLE_USER, content="Tell me"),
        lm.Message(role=lm.ROLE_ASSISTANT, content="</think>Once upon a"),
    ]
    answer = await vllm.chat(
        messages=messages, continue_final_message=True, sampling=lm.Sampling(max_tokens=8, **GREEDY)
    )
    same = await vllm.complete(
        "<|im_start|>user\nTell me<|im_end|>\n<|im_start|>assistant\n</think>Once upon a",
        sampling=lm.Sampling(max_tokens=8, **GREEDY),
    )
    assert answer.ids() == same.ids() and answer.usage.prompt_tokens == same.usage.prompt_tokens


async def test_reasoning_is_told_apart(vllm: Client) -> None:
    shape, end, thought = lm.Constraint(regex="hello"), await _end(vllm), 0
    for seed in range(8):  # noise may end its reasoning before it began
        answer = await vllm.chat(constraint=shape, sampling=lm.Sampling(max_tokens=1500, seed=seed, logit_bias=end))
        assert answer.text() == "hello"
        assert "</think>" not in answer.reasoning()
        assert bool(answer.reasoning()) == (answer.usage.reasoning_tokens > 0)
        assert answer.usage.reasoning_tokens < answer.usage.completion_tokens
        thought += bool(answer.reasoning())
    assert thought


async def _end(vllm: Client) -> dict[int, float]:
    """Makes noise come to the end of its reasoning."""
    reply = await vllm.stub.Tokenize(lm.TokenizeRequest(model=MODEL, text="</think>"))
    (token,) = reply.token_ids
    return {token: 8.0}


async def test_a_required_tool_call(vllm: Client) -> None:
    answer = await vllm.chat(
        tools=[WEATHER],
        tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_REQUIRED, parallel=False),
        template_args_json=NO_THINKING,
        sampling=lm.Sampling(max_tokens=3000),
    )
    assert list(answer.calls()) == [0]
    name, arguments = answer.calls()[0]
    assert name == "get_weather" and json.loads(arguments)["city"] in ("Paris", "Rome")
    assert answer.finish() == lm.FINISH_TOOL_CALLS and answer.text().strip() == ""


async def test_a_named_tool_call(vllm: Client) -> None:
    answer = await vllm.chat(
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


async def test_auto_finds_the_call_in_the_text(vllm: Client) -> None:
    begin = "<tool_call>"
    start = (await vllm.stub.Tokenize(lm.TokenizeRequest(model=MODEL, text=begin))).token_ids[0]
    answer = await vllm.chat(
        tools=[WEATHER],
        template_args_json=NO_THINKING,
        sampling=lm.Sampling(max_tokens=3000, logit_bias={start: 100}),
        tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_AUTO, parallel=False),
    )
    assert answer.calls()[0][0] == "get_weather" and begin not in answer.text()


async def test_none_leaves_the_text_alone(vllm: Client) -> None:
    answer = await vllm.chat(
        tools=[WEATHER],
        tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_NONE),
        template_args_json=NO_THINKING,
        constraint=lm.Constraint(choice=lm.Choice(choices=['<tool_call>{"name": "get_weather"}</tool_call>'])),
    )
    assert not answer.calls() and answer.text().startswith("<tool_call>")


async def test_a_forced_call_excludes_a_constraint(vllm: Client) -> None:
    error = await vllm.refused(
        vllm.chat(
            tools=[WEATHER],
            tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_REQUIRED),
            constraint=lm.Constraint(regex="a"),
        )
    )
    assert (error.reason, error.param) == (Reason.UNSUPPORTED, "constraint")
