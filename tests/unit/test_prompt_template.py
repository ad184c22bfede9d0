"""Four-part prompts, the golden text and its time."""

from __future__ import annotations

import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from services.llm.prompt_template import Rendered, render, template_time
from services.llm.settings import PromptTemplate

VICUNA = PromptTemplate(
    sys="A chat with an assistant.\nCurrent time: {}.\n", user="\nUSER: {}", ai="\nASSISTANT: {}", sep="</s>"
)
NOON = 1_700_049_600  # 2023-11-15 12:00:00 UTC
MIDNIGHT = 1_700_006_400


def says(role: lm.Role, text: str) -> lm.Message:
    return lm.Message(role=role, content=text)


def test_golden() -> None:
    turns = [
        says(lm.ROLE_USER, "Hi {}"),
        says(lm.ROLE_ASSISTANT, "Hello"),
        lm.Message(role=lm.ROLE_USER, parts=[lm.ContentPart(text="a"), lm.ContentPart(text="b")]),
    ]
    assert render(VICUNA, turns, MIDNIGHT) == Rendered(
        "A chat with an assistant.\nCurrent time: 2023-11-15.\n"
        "\nUSER: Hi {}\nASSISTANT: Hello</s>\nUSER: ab\nASSISTANT:",
        strip_space=True,
    )


def test_a_time_of_day_is_shown_where_it_is_not_midnight() -> None:
    assert "time: 2023-11-15 12:00:00." in render(VICUNA, [says(lm.ROLE_USER, "x")], NOON).text


def test_system_messages_follow_sys() -> None:
    text = render(VICUNA, [says(lm.ROLE_SYSTEM, "Be brief."), says(lm.ROLE_USER, "x")], MIDNIGHT).text
    assert text.startswith("A chat with an assistant.\nCurrent time: 2023-11-15.\nBe brief.\n\nUSER: x")


def test_a_continued_answer_is_left_open() -> None:
    turns = [says(lm.ROLE_USER, "x"), says(lm.ROLE_ASSISTANT, "Once ")]
    assert render(VICUNA, turns, MIDNIGHT, continue_final_message=True).text.endswith("\nUSER: x\nASSISTANT: Once ")


def test_no_generation_prompt() -> None:
    rendered = render(VICUNA, [says(lm.ROLE_USER, "x")], MIDNIGHT, add_generation_prompt=False)
    assert rendered.text.endswith("USER: x") and not rendered.strip_space


@pytest.mark.parametrize(
    "message",
    [
        lm.Message(role=lm.ROLE_TOOL, content="3", tool_call_id="1"),
        lm.Message(role=lm.ROLE_ASSISTANT, tool_calls=[lm.ToolCall(name="f")]),
    ],
)
def test_what_has_no_place_is_refused(message: lm.Message) -> None:
    with pytest.raises(MeshError) as refused:
        render(VICUNA, [says(lm.ROLE_USER, "x"), message], MIDNIGHT)
    assert refused.value.reason is Reason.UNSUPPORTED and refused.value.param == "messages[1]"


def test_the_time_is_the_gateways_or_rounded() -> None:
    assert template_time(12345, NOON + 7, 86400) == 12345
    assert template_time(0, NOON + 7, 86400) == MIDNIGHT
    assert template_time(0, NOON + 7, 3600) == NOON
