"""What is sent to each family of servers, and how their lines and errors are read."""

from __future__ import annotations

from typing import Any

import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Delivery, Relay, Resume, TokenIds
from services.llm.engines.openai_family import INFERMESH, LLAMA_CPP, OLLAMA, OPENAI, SGLANG, VLLM, at_least
from services.llm.engines.openai_reply import SseLines, error_of
from services.llm.engines.openai_resume import check, continued
from services.llm.engines.openai_wire import Upstream, chat_body, complete_body


def chat(text: str = "hi", **fields: Any) -> lm.ChatRequest:
    return lm.ChatRequest(model="m", messages=[lm.Message(role=lm.ROLE_USER, content=text)], **fields)


def test_a_line_without_end_is_not_collected_for_ever() -> None:
    lines = SseLines()
    with pytest.raises(MeshError, match="without end"):
        for _ in range(100):
            list(lines.feed(b"data: " + b"x" * (1 << 20)))


def _up(family: Any, version: str = "0.32") -> Upstream:
    return Upstream(family, "m", version)


@pytest.mark.parametrize(
    ("request_", "upstream", "param"),
    [
        (chat(sampling=lm.Sampling(top_k=5)), _up(OPENAI), "sampling.top_k"),
        (chat(sampling=lm.Sampling(n=2)), _up(OLLAMA), "sampling.n"),
        (chat(sampling=lm.Sampling(logit_bias={1: 2})), _up(OLLAMA), "sampling.logit_bias"),
        (chat(sampling=lm.Sampling(prompt_logprobs=1)), _up(VLLM), "sampling.prompt_logprobs"),
        (chat(sampling=lm.Sampling(logprobs=1)), _up(OLLAMA), "sampling.logprobs"),
        (chat(constraint=lm.Constraint(regex="a")), _up(OPENAI), "constraint.regex"),
        (chat(constraint=lm.Constraint(structural_tag="{}")), _up(SGLANG), "constraint.structural_tag"),
        (chat(template_args_json='{"a":1}'), _up(OPENAI), "template_args_json"),
        (chat(continue_final_message=True), _up(OPENAI), "continue_final_message"),
        (chat(delivery=Delivery(token_ids=True)), _up(SGLANG), "delivery.token_ids"),
        (
            chat(tools=[lm.Tool(name="f")], tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_NONE)),
            _up(OLLAMA),
            "tool_choice",
        ),
        (lm.CompleteRequest(text="x", echo=True), _up(OLLAMA), "echo"),
        (lm.CompleteRequest(token_ids=TokenIds(ids=[1])), _up(OLLAMA), "prompt"),
        (
            lm.ChatRequest(messages=[lm.Message(role=lm.ROLE_ASSISTANT, reasoning="r")]),
            _up(OPENAI),
            "messages[0].reasoning",
        ),
    ],
)
def test_what_a_family_would_ignore_is_refused_by_name(request_: Any, upstream: Upstream, param: str) -> None:
    build: Any = chat_body if isinstance(request_, lm.ChatRequest) else complete_body
    with pytest.raises(MeshError) as caught:
        build(request_, upstream)
    assert (caught.value.reason, caught.value.param) == (Reason.UNSUPPORTED, param)


@pytest.mark.parametrize(
    ("constraint", "upstream", "field", "value"),
    [
        (lm.Constraint(regex="a+"), _up(VLLM), "structured_outputs", {"regex": "a+"}),
        (lm.Constraint(regex="a+"), _up(VLLM, "0.10.2"), "guided_regex", "a+"),
        (lm.Constraint(choice=lm.Choice(choices=["a", "b"])), _up(VLLM), "structured_outputs", {"choice": ["a", "b"]}),
        (lm.Constraint(grammar="root ::= x"), _up(SGLANG), "ebnf", "root ::= x"),
        (lm.Constraint(json_object=True), _up(OPENAI), "response_format", {"type": "json_object"}),
        (
            lm.Constraint(json_schema='{"type": "object"}'),
            _up(OLLAMA),
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True}},
        ),
    ],
)
def test_constraints_are_put_as_each_family_takes_them(
    constraint: lm.Constraint, upstream: Upstream, field: str, value: Any
) -> None:
    assert chat_body(chat(constraint=constraint), upstream)[field] == value


def test_an_answer_longer_than_the_context_is_asked_for_as_long_as_it_may_be() -> None:
    """`max_tokens` is an upper bound, which such servers take for a demand."""
    request = chat(sampling=lm.Sampling(max_tokens=1 << 31))
    assert chat_body(request, Upstream(VLLM, "m", context=4096))["max_tokens"] == 4095
    assert chat_body(request, Upstream(OPENAI, "m"))["max_tokens"] == 1 << 31


def test_every_field_of_sampling_is_either_sent_or_refused() -> None:
    values = {
        "stop": ["x"],
        "stop_token_ids": [1],
        "logit_bias": {1: 1.0},
        "n": 2,
        "include_stop": True,
        "ignore_eos": True,
    }
    for name in lm.Sampling.DESCRIPTOR.fields_by_name:
        request = chat(sampling=lm.Sampling(**{name: values.get(name, 1)}))
        for family in (OPENAI, VLLM, SGLANG, LLAMA_CPP, OLLAMA, INFERMESH):
            try:
                body = chat_body(request, _up(family))
            except MeshError as error:
                assert error.reason is Reason.UNSUPPORTED
            else:
                assert len(body) > 4, (family.name, name)


def test_versions_and_error_bodies() -> None:
    assert at_least("0.11.0", 0, 11) and at_least("0.32.1.dev3", 0, 11) and not at_least("0.9.2", 0, 11)
    assert at_least("", 0, 11)
    assert "(HTTP 418)" in error_of(418, b"").message


@pytest.mark.parametrize(
    ("request_", "upstream", "param"),
    [
        (chat(relay=Relay(resume=Resume(token_ids=[1]))), _up(VLLM), "relay.resume.text"),
        (chat(relay=Relay(resume=Resume(text="a"))), _up(OPENAI), "relay.resume"),
        (
            lm.CompleteRequest(token_ids=TokenIds(ids=[1]), relay=Relay(resume=Resume(text="a"))),
            _up(VLLM),
            "relay.resume",
        ),
    ],
)
def test_what_cannot_be_continued_as_text_is_refused(request_: Any, upstream: Upstream, param: str) -> None:
    with pytest.raises(MeshError) as caught:
        check(request_, upstream)
    assert (caught.value.reason, caught.value.param) == (Reason.UNSUPPORTED, param)


def test_an_answer_is_continued_as_the_beginning_of_a_message_or_a_prompt() -> None:
    begun = Relay(resume=Resume(text="Guten "))
    asked = chat(relay=begun, add_generation_prompt=True, sampling=lm.Sampling(max_tokens=9, min_tokens=3))
    body = chat_body(continued(asked, 4), _up(VLLM))
    assert body["messages"][-1] == {"role": "assistant", "content": "Guten "}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["max_tokens"], body["min_tokens"]) == (5, 0)
    own = chat(relay=begun, continue_final_message=True)
    own.messages.add(role=lm.ROLE_ASSISTANT, content="Well: ")
    assert [m["content"] for m in chat_body(continued(own, 4), _up(SGLANG))["messages"]] == ["hi", "Well: Guten "]
    completion = lm.CompleteRequest(text="Say: ", echo=True, relay=begun)
    body = complete_body(continued(completion, 4), _up(VLLM))
    assert body["prompt"] == "Say: Guten " and "echo" not in body
