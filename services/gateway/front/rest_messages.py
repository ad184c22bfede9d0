"""Conversations and tools, from OpenAI's JSON into the contract. Pure."""

from __future__ import annotations

from typing import Any

from infermesh.errors import invalid, unsupported
from infermesh.v1 import language_model_pb2 as lm
from services.gateway.front.rest_generation import json_text
from services.gateway.front.rest_schema import MessageShape, ToolShape

_ROLES = {
    "system": lm.ROLE_SYSTEM,
    "developer": lm.ROLE_DEVELOPER,
    "user": lm.ROLE_USER,
    "assistant": lm.ROLE_ASSISTANT,
    "tool": lm.ROLE_TOOL,
}
_MODES = {
    "none": lm.ToolChoice.MODE_NONE,
    "auto": lm.ToolChoice.MODE_AUTO,
    "required": lm.ToolChoice.MODE_REQUIRED,
}
_PARTS = {
    "image_url": "image inputs are not served",
    "input_image": "image inputs are not served",
    "image": "image inputs are not served",
    "input_audio": "audio inputs are not served",
    "audio_url": "audio inputs are not served",
    "video_url": "video inputs are not served",
    "file": "file inputs are not served",
}


def add_messages(made: Any, given: list[MessageShape]) -> None:
    """Fills a repeated `Message` field in place: a prompt may be megabytes, and each copy of it holds the loop.

    Raises:
        MeshError: INVALID_ARGUMENT or UNSUPPORTED, with the message's path.
    """
    for index, shape in enumerate(given):
        _fill(made.add(), f"messages[{index}]", shape)


def _fill(made: lm.Message, path: str, shape: MessageShape) -> None:
    made.role = _ROLES[shape.role]
    content = shape.content
    if isinstance(content, str):
        made.content = content
    elif isinstance(content, list):
        for index, part in enumerate(content):
            made.parts.add().text = _part(f"{path}.content[{index}]", part)
    elif content is not None:
        raise invalid(f"{path}.content", "must be a string or a list of parts")
    elif shape.refusal:
        made.content = shape.refusal
    elif shape.role != "assistant":
        raise invalid(f"{path}.content", "this parameter is required")
    if shape.name:
        made.name = shape.name
    if shape.tool_call_id:
        made.tool_call_id = shape.tool_call_id
    if reasoning := shape.reasoning_content or shape.reasoning:
        made.reasoning = reasoning
    for call in shape.tool_calls or ():
        made.tool_calls.add(id=call.id, name=call.function.name, arguments_json=call.function.arguments)


def _part(path: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise invalid(path, "must be an object with a `type`")
    kind = part.get("type")
    if kind in _PARTS:
        raise unsupported(path, _PARTS[kind])
    field = "refusal" if kind == "refusal" else "text"
    if kind not in ("text", "refusal"):
        raise unsupported(f"{path}.type", "must be text")
    text = part.get(field)
    if not isinstance(text, str):
        raise invalid(f"{path}.{field}", "must be a string")
    if extra := sorted(key for key in part.keys() - {"type", field} if part[key] is not None):
        raise unsupported(f"{path}.{extra[0][:64]}", "this parameter is not served")
    return text


def tools(given: list[ToolShape] | None) -> list[lm.Tool]:
    made = []
    for index, shape in enumerate(given or ()):
        function = shape.function
        tool = lm.Tool(name=function.name, description=function.description or "", strict=bool(function.strict))
        if function.parameters is not None:
            tool.parameters_json = json_text(f"tools[{index}].function.parameters", function.parameters)
        made.append(tool)
    return made


def tool_choice(value: Any, parallel: bool | None) -> lm.ToolChoice | None:
    """Raises MeshError: INVALID_ARGUMENT or UNSUPPORTED."""
    if value is None and parallel is None:
        return None
    made = lm.ToolChoice()
    if parallel is not None:
        made.parallel = parallel
    if isinstance(value, str) and value in _MODES:
        made.mode = _MODES[value]
    elif isinstance(value, dict):
        if value.get("type") != "function":
            raise unsupported("tool_choice.type", "must be function")
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise invalid("tool_choice.function.name", "must be the name of a tool")
        made.mode = lm.ToolChoice.MODE_FUNCTION
        made.function = name
    elif value is not None:
        raise invalid("tool_choice", "must be none, auto, required or a function of `tools`")
    return made
