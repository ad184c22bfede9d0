"""From REST bodies to the contract's messages, and from events to JSON: the pure half of the REST front."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infermesh.errors import MeshError, Reason
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm
from services.gateway.front.chat_reply import ChatChunks, ChatCollected, ChatOptions
from services.gateway.front.completion_reply import CompletionChunks, CompletionCollected, CompletionOptions
from services.gateway.front.rest_body import ignored
from services.gateway.front.rest_chat import chat_request
from services.gateway.front.rest_completions import completion_request
from services.gateway.front.rest_errors import dotted, error_headers, faults, rest_param
from services.gateway.front.rest_json import MAX_CONTAINERS, parse_json
from services.gateway.front.rest_schema import ChatBody, CompletionBody

HI = [{"role": "user", "content": "hi"}]


def body(**fields):
    return ChatBody.model_validate({"model": "m", "messages": HI, **fields})


def request(**fields):
    return chat_request(body(**fields))[0]


def test_every_sampling_parameter_arrives():
    sent = request(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        repetition_penalty=1.5,
        seed=-3,
        max_tokens=9,
        min_tokens=2,
        n=3,
        stop=["a", "b"],
        stop_token_ids=[5],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logit_bias={"12": -100, "4294967295": 1.5},
        logprobs=True,
        top_logprobs=4,
        prompt_logprobs=1,
    ).sampling
    assert sent == lm.Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        repetition_penalty=1.5,
        seed=-3,
        max_tokens=9,
        min_tokens=2,
        n=3,
        stop=["a", "b"],
        stop_token_ids=[5],
        include_stop=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logit_bias={12: -100, 4294967295: 1.5},
        logprobs=4,
        prompt_logprobs=1,
    )


def test_what_is_not_given_stays_unset():
    sent = request(temperature=None, stop=None, logprobs=None)
    assert sent.sampling == lm.Sampling()
    assert not sent.HasField("constraint") and not sent.HasField("tool_choice")
    assert not sent.HasField("add_generation_prompt")
    assert sent.delivery == inf.Delivery(min_interval_ms=250)
    assert request(stream=True).delivery == inf.Delivery()
    assert request(return_token_ids=True, stream=True).delivery == inf.Delivery(token_ids=True)


def test_zero_and_false_are_given():
    sent = request(temperature=0, seed=0, logprobs=True, skip_special_tokens=False, ignore_eos=False).sampling
    for name in ("temperature", "seed", "logprobs", "skip_special_tokens"):
        assert sent.HasField(name)


def test_max_completion_tokens_is_max_tokens():
    made, names = chat_request(body(max_completion_tokens=5))
    assert made.sampling.max_tokens == 5
    assert rest_param("sampling.max_tokens", names) == "max_completion_tokens"
    assert request(max_completion_tokens=5, max_tokens=5).sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, lm.Constraint(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
            lm.Constraint(json_schema='{"type":"object"}'),
        ),
        ({"guided_json": {"a": 1}}, lm.Constraint(json_schema='{"a":1}')),
        ({"guided_json": '{"a": 1}'}, lm.Constraint(json_schema='{"a": 1}')),
        ({"structured_outputs": {"json": {"a": 1}}}, lm.Constraint(json_schema='{"a":1}')),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, lm.Constraint(regex="a+")),
        ({"structured_outputs": {"json_object": True}}, lm.Constraint(json_object=True)),
        ({"guided_grammar": "root ::= x"}, lm.Constraint(grammar="root ::= x")),
        ({"guided_choice": ["a", "b"]}, lm.Constraint(choice=lm.Choice(choices=["a", "b"]))),
    ],
)
def test_constraints(fields, expected):
    made = request(**fields)
    assert (made.constraint if made.HasField("constraint") else None) == expected


def test_messages_of_all_roles():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    made = request(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "u"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "r"},
            {"role": "tool", "content": "t", "tool_call_id": "c1"},
        ]
    ).messages
    assert [message.role for message in made] == [
        lm.ROLE_SYSTEM,
        lm.ROLE_DEVELOPER,
        lm.ROLE_USER,
        lm.ROLE_ASSISTANT,
        lm.ROLE_TOOL,
    ]
    assert [part.text for part in made[2].parts] == ["a", "b"] and made[2].name == "u"
    assert made[3].tool_calls[0] == lm.ToolCall(id="c1", name="f", arguments_json='{"x":1}')
    assert made[3].reasoning == "r" and made[4].tool_call_id == "c1"


def test_tools_template_arguments_and_session():
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}, "strict": True}}
    made = request(
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "f"}},
        parallel_tool_calls=True,
        chat_template_kwargs={"enable_thinking": True},
        reasoning_effort="none",
        prompt_cache_key="k",
        priority=5,
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert made.tools[0] == lm.Tool(name="f", description="d", parameters_json="{}", strict=True)
    assert made.tool_choice == lm.ToolChoice(mode=lm.ToolChoice.MODE_FUNCTION, function="f", parallel=True)
    assert json.loads(made.template_args_json) == {"enable_thinking": True, "reasoning_effort": "none"}
    assert made.hints == inf.Hints(session_id="k", priority=-5)
    assert made.continue_final_message and made.HasField("add_generation_prompt")


def test_completion_defaults_and_logprobs():
    made, names = completion_request(CompletionBody.model_validate({"model": "m", "prompt": "x", "logprobs": 2}))
    assert made.sampling == lm.Sampling(max_tokens=16, logprobs=2)
    echoed, names = completion_request(
        CompletionBody.model_validate({"model": "m", "prompt": "x", "logprobs": 2, "echo": True, "max_tokens": 1})
    )
    assert echoed.echo and echoed.sampling.prompt_logprobs == 2
    assert rest_param("sampling.prompt_logprobs", names) == "logprobs"


def test_ignored_parameters_are_a_closed_list():
    raw = {"user": "u", "store": None, "metadata": {}, "stream_options": {"include_obfuscation": False}}
    assert ignored(raw, ChatBody) == ["metadata", "stream_options.include_obfuscation", "user"]
    assert body(user="u", metadata={}, service_tier="auto", verbosity="low", safety_identifier="s").model == "m"


def test_faults_carry_paths_and_no_input():
    secret = "my private prompt"
    with pytest.raises(ValidationError) as caught:
        body(messages=[{"role": "user", "content": "x", "tool_calls": secret}], temperature=secret, oops=secret)
    error = faults(caught.value)
    assert error.reason is Reason.INVALID_ARGUMENT
    assert "oops: this parameter is not served" in error.message and "temperature" in error.message
    assert secret not in error.message
    assert dotted(("messages", 0, "content", 12)) == "messages[0].content[12]"


def test_names_on_this_side():
    names = {"hints": "h", "hints.session_id": "prompt_cache_key", "texts": "input"}
    assert rest_param("hints.session_id", names) == "prompt_cache_key"
    assert rest_param("hints.priority", names) == "h.priority"
    assert rest_param("texts[3]", names) == "input[3]"
    assert rest_param("texts_too", names) == "texts_too"
    assert rest_param("sampling.stop[2]", names) == "stop[2]"
    assert rest_param(None, names) is None


def test_only_refusals_for_want_of_room_invite_back():
    invited = {reason for reason in Reason if not dict(error_headers(MeshError(reason, ""))).get(b"x-should-retry")}
    assert invited == {
        Reason.RATE_LIMITED,
        Reason.QUEUE_FULL,
        Reason.QUEUE_TIMEOUT,
        Reason.INSTANCE_FULL,
        Reason.NO_INSTANCE,
        Reason.STARTING,
        Reason.DRAINING,
    }


@pytest.mark.parametrize("text", ['a"b\\', "[[[{{{,,,:::", '\\"[', "\\\\", "é漢🙂[,"])
async def test_what_is_inside_strings_is_not_counted(text):
    long = text * (400_000 // len(text))
    assert (await parse_json(json.dumps({"a": long}).encode()))["a"] == long


async def test_wide_bodies_are_refused_and_long_prompts_are_not():
    ids = {"prompt": list(range(100_000, 400_000))}
    assert await parse_json(json.dumps(ids).encode()) == ids
    wide = json.dumps({"a": [{}] * (MAX_CONTAINERS + 1)}).encode()
    with pytest.raises(MeshError, match="at most"):
        await parse_json(wide)


text_pieces = st.lists(st.text(max_size=8), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(text_pieces, st.integers(1, 3))
def test_chunks_and_whole_replies_tell_the_same(pieces, n):
    """However the tokens fall, the stream's text is the reply's text, in order, and every line is JSON."""
    chat, plain = [], []
    for kind, made in ((lm.ChatResponse, chat), (lm.CompleteResponse, plain)):
        for at, piece in enumerate(pieces):
            event = kind()
            if at == 0:
                event.started.id, event.started.created, event.started.model = "i", 5, "m"
            for choice in range(n):
                event.deltas.add(choice=choice, content=piece, finish=lm.FINISH_STOP if piece is pieces[-1] else 0)
            made.append(event)
        made.append(kind(usage=inf.Usage(prompt_tokens=1, completion_tokens=2)))

    whole = ChatCollected(ChatOptions())
    chunks = ChatChunks(ChatOptions(include_usage=True), chat[0].started, "m", "f")
    lines = b""
    for event in chat:
        whole.add(event)
        lines += chunks.render(event)
    lines += chunks.last(chat[-1].usage)
    told = whole.reply("m", "f")
    parsed = [json.loads(line[6:]) for line in lines.decode().split("\n\n") if line]
    assert parsed[-1]["choices"] == [] and parsed[-1]["usage"] == told["usage"]
    for choice in told["choices"]:
        mine = [one["choices"][0] for one in parsed[:-1] if one["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in mine) == choice["message"]["content"]
        assert choice["message"]["content"] == "".join(pieces)
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"

    options = CompletionOptions(n=n, prompts=("",))
    gathered, stream = CompletionCollected(options), CompletionChunks(options)
    stream.begin(0, plain[0], "m", "f")
    lines = b""
    for event in plain:
        gathered.add(0, event)
        lines += stream.render(0, event)
    texts = [""] * n
    for line in lines.decode().split("\n\n"):
        if line:
            choice = json.loads(line[6:])["choices"][0]
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in gathered.reply("m", "f")["choices"]] == ["".join(pieces)] * n


def test_an_aborted_choice_is_an_error_and_no_finish():
    event = lm.ChatResponse(deltas=[lm.Delta(finish=lm.FINISH_ABORT)])
    with pytest.raises(MeshError) as caught:
        ChatCollected(ChatOptions()).add(event)
    assert caught.value.reason is Reason.ENGINE_FAILED
