"""Prompts in four parts (`sys`, `user`, `ai`, `sep`), for models without a chat template. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from infermesh.errors import invalid, unsupported
from infermesh.v1 import language_model_pb2 as lm
from services.llm.settings import PromptTemplate

DAY_S = 86400


@dataclass(frozen=True, slots=True)
class Rendered:
    """`strip_space`: the prompt ends before a space of the template, so the answer begins with it. Cutting it there and
    here is what keeps a tokenizer from seeing two spaces (models of this kind are trained on `ASSISTANT: answer`).
    """

    text: str
    strip_space: bool = False


def render(
    template: PromptTemplate,
    messages: Sequence[lm.Message],
    at: int,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> Rendered:
    """`at`: unix seconds for the `{}` of `sys`. What system messages say follows `sys`, a line each.

    Raises:
        MeshError: UNSUPPORTED, for a role that the four parts have no place for.
    """
    head = [template.sys.replace("{}", format_time(at))]
    turns = []
    for index, message in enumerate(messages):
        text = message_text(message)
        if message.role in (lm.ROLE_SYSTEM, lm.ROLE_DEVELOPER):
            head.append(text + "\n")
        elif message.role == lm.ROLE_USER:
            turns.append(template.user.replace("{}", text))
        elif message.role == lm.ROLE_ASSISTANT and not message.tool_calls:
            last = continue_final_message and index == len(messages) - 1
            turns.append(template.ai.split("{}")[0] + text if last else template.ai.replace("{}", text) + template.sep)
        else:
            what = "tool calls" if message.tool_calls else "a tool's answer"
            raise unsupported(f"messages[{index}]", f"this model's prompt template has no place for {what}")
    if continue_final_message or not add_generation_prompt:
        return Rendered("".join(head + turns))
    opening = template.ai.split("{}")[0]
    bare = opening.rstrip(" ")
    return Rendered("".join([*head, *turns, bare]), strip_space=bare != opening)


def message_text(message: lm.Message) -> str:
    return "".join(part.text for part in message.parts) if message.parts else message.content


def template_time(rendered_at: int, now: float, granularity_s: int) -> int:
    """Unix seconds for templates: what the gateway fixed, else `now` rounded down, because a fresh clock in every
    prompt would leave nothing for the prefix cache to find.
    """
    return rendered_at or int(now) // granularity_s * granularity_s


def format_time(at: int) -> str:
    """A date for whole days, else date and time, both UTC so that every instance renders the same."""
    when = datetime.fromtimestamp(at, UTC)
    return when.strftime("%Y-%m-%d" if at % DAY_S == 0 else "%Y-%m-%d %H:%M:%S")


def refuse_jinja_arguments(request: lm.ChatRequest) -> None:
    """What only a chat template can take.

    Raises:
        MeshError: UNSUPPORTED or INVALID_ARGUMENT, with the field.
    """
    if request.tools:
        raise unsupported("tools", "this model's prompt template has no place for tools")
    if request.template_args_json:
        raise invalid("template_args_json", "this instance renders prompts from four parts, which take no arguments")
