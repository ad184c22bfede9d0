"""Plain values become requests: nothing that was given is dropped on the way."""

from __future__ import annotations

from typing import Any

import pytest

from infermesh.client.requests import chat_request, embed_request, message, rerank_request, truncation_of
from infermesh.errors import MeshError
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm
from services.chassis.checks import check_chat


def chat(**options: Any) -> lm.ChatRequest:
    return chat_request("hello", "m", options)


def test_options_land_where_they_belong() -> None:
    request = chat(
        temperature=0, stop="x", stop_token_ids=[1], logit_bias={5: -1.0}, degrade=False, priority=-3, token_ids=True
    )
    sampling = request.sampling
    assert sampling.HasField("temperature") and (list(sampling.stop), list(sampling.stop_token_ids)) == (["x"], [1])
    assert dict(sampling.logit_bias) == {5: -1.0} and request.delivery.token_ids
    assert (request.hints.priority, request.hints.degrade) == (-3, inf.DEGRADE_NEVER)
    with pytest.raises(TypeError, match="no such option: temprature"):
        chat(temprature=1)


@pytest.mark.parametrize(
    ("options", "which"),
    [
        ({"json_schema": {}}, "json_schema"),
        ({"json_schema": {"type": "object"}}, "json_schema"),
        ({"regex": "a+"}, "regex"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"choice": ["a"]}, "choice"),
        ({"json_object": True}, "json_object"),
        ({"json_object": False, "regex": None}, None),
    ],
)
def test_constraints(options: dict[str, Any], which: str | None) -> None:
    request = chat(**options)
    assert request.constraint.WhichOneof("constraint") == which
    check_chat(request)


@pytest.mark.parametrize("options", [{"choice": []}, {"regex": ""}, {"grammar": ""}, {"json_schema": ""}])
def test_an_empty_constraint_is_refused_by_the_mesh_and_not_dropped(options: dict[str, Any]) -> None:
    with pytest.raises(MeshError) as refused:
        check_chat(chat(**options))
    assert refused.value.param == f"constraint.{next(iter(options))}"


def test_two_constraints_exclude_each_other() -> None:
    with pytest.raises(TypeError, match="json_schema and regex exclude each other"):
        chat(regex="", json_schema={})


def test_turns_and_tools_have_openais_shapes() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": {"a": 1}}}
    turn = message({"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "why"})
    assert (turn.role, turn.reasoning, turn.tool_calls[0].arguments_json) == (lm.ROLE_ASSISTANT, "why", '{"a": 1}')
    parts = message({"role": "user", "content": [{"type": "text", "text": "x"}, {"image_url": {"url": "u"}}]}).parts
    assert [part.WhichOneof("part") for part in parts] == ["text", "image_url"]
    with pytest.raises(ValueError, match="role 'bot' is not one of"):
        message({"role": "bot"})
    request = chat_request("x", "m", {}, tools=[{"function": {"name": "f", "strict": True}}], tool_choice="f")
    assert request.tools[0].strict
    assert (request.tool_choice.mode, request.tool_choice.function) == (lm.ToolChoice.MODE_FUNCTION, "f")


def test_embedding_and_rerank() -> None:
    assert list(embed_request("one", "m").texts) == ["one"]
    assert [list(ids.ids) for ids in embed_request([[1, 2], [3]], "m", normalize=False).token_ids] == [[1, 2], [3]]
    assert not embed_request("x", "m").HasField("normalize") and embed_request("x", "m", normalize=False).HasField(
        "normalize"
    )
    assert rerank_request("q", ["d"], "m", top_n=1, truncation="start").truncation == em.TRUNCATION_START
    with pytest.raises(ValueError, match="none, end, start"):
        truncation_of("middle")
