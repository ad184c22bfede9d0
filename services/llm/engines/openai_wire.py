"""Our requests as OpenAI's JSON bodies. Pure. What the server's family does not obey is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from infermesh.errors import unsupported
from infermesh.v1 import language_model_pb2 as lm
from services.llm.engines.openai_family import STANDARD, Family, at_least

Body = dict[str, Any]
ROLES = {
    lm.ROLE_SYSTEM: "system",
    lm.ROLE_DEVELOPER: "system",  # templates of open models know no other
    lm.ROLE_USER: "user",
    lm.ROLE_ASSISTANT: "assistant",
    lm.ROLE_TOOL: "tool",
}


@dataclass(frozen=True, slots=True)
class Upstream:
    """The server, as probed. `context`: tokens of prompt and answer together; `slots`: requests at a time. 0 = it does
    not tell."""

    family: Family
    model: str
    version: str = ""
    context: int = 0
    slots: int = 0

    def needs(self, feature: str, param: str) -> None:
        """
        Raises:
            MeshError: UNSUPPORTED, naming the field.
        """
        if feature not in self.family.features:
            raise unsupported(param, f"the server behind this instance ({self.family.name}) does not serve it")


def chat_body(request: lm.ChatRequest, upstream: Upstream) -> Body:
    body = _shared(request, upstream)
    body["messages"] = [_message(f"messages[{at}]", m, upstream) for at, m in enumerate(request.messages)]
    if request.sampling.HasField("logprobs"):
        upstream.needs("logprobs", "sampling.logprobs")
        body |= {"logprobs": True, "top_logprobs": request.sampling.logprobs}
    if request.tools:
        upstream.needs("tools", "tools")
        body["tools"] = [_tool(tool) for tool in request.tools]
        body |= _tool_choice(request.tool_choice, upstream)
    if request.template_args_json:
        upstream.needs("template_args", "template_args_json")
        body["chat_template_kwargs"] = json.loads(request.template_args_json)
    if request.continue_final_message:
        upstream.needs("continue_final", "continue_final_message")
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    elif request.HasField("add_generation_prompt"):
        upstream.needs("continue_final", "add_generation_prompt")
        body["add_generation_prompt"] = request.add_generation_prompt
    return body


def complete_body(request: lm.CompleteRequest, upstream: Upstream) -> Body:
    body = _shared(request, upstream)
    if request.WhichOneof("prompt") == "token_ids":
        upstream.needs("prompt_ids", "prompt")
        body["prompt"] = list(request.token_ids.ids)
    else:
        body["prompt"] = request.text
    if request.sampling.HasField("logprobs"):
        upstream.needs("logprobs", "sampling.logprobs")
        body["logprobs"] = request.sampling.logprobs
    if request.echo:
        upstream.needs("echo", "echo")
        body["echo"] = True
    return body


def _shared(request: lm.ChatRequest | lm.CompleteRequest, upstream: Upstream) -> Body:
    usage = {"include_usage": True}
    if "usage_each" in upstream.family.features:
        usage["continuous_usage_stats"] = True
    body: Body = {"model": upstream.model, "stream": True, "stream_options": usage}
    body |= _sampling(request.sampling, upstream)
    body |= _constraint(request.constraint, upstream)
    if request.relay.cache_salt and "prefix_salt" in upstream.family.features:
        body["cache_salt"] = request.relay.cache_salt.hex()
    if request.delivery.token_ids:
        upstream.needs("token_ids", "delivery.token_ids")
    if "token_ids" in upstream.family.features and (request.delivery.token_ids or request.HasField("relay")):
        body["return_token_ids"] = True
    return body


def _sampling(sampling: lm.Sampling, upstream: Upstream) -> Body:
    body: Body = {}
    names = {name: name for name in STANDARD} | dict(upstream.family.sampling)
    for descriptor, value in sampling.ListFields():
        name = descriptor.name
        if name == "logprobs":
            continue  # chat and completion put it differently
        if name == "n":
            if value > 1:
                upstream.needs("n", "sampling.n")
                body["n"] = value
        elif name == "logit_bias":
            upstream.needs("logit_bias", "sampling.logit_bias")
            body["logit_bias"] = {str(token): _plain(bias) for token, bias in value.items()}
        elif name == "max_tokens" and upstream.context:
            body[name] = min(value, upstream.context - 1)  # an upper bound; servers refuse what exceeds the context
        elif name in names:
            body[names[name]] = _plain(value)
        else:
            raise unsupported(f"sampling.{name}", f"the server behind this instance ({upstream.family.name}) lacks it")
    return body


def _plain(value: Any) -> Any:
    """As JSON has it: lists, and floats without the digits that 32 bits never had."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return value if isinstance(value, bool | int) else list(value)


def _constraint(constraint: lm.Constraint, upstream: Upstream) -> Body:
    which = constraint.WhichOneof("constraint")
    if which is None or (which == "json_object" and not constraint.json_object):
        return {}
    upstream.needs(which, f"constraint.{which}")
    if which == "json_object":
        return {"response_format": {"type": "json_object"}}
    if which == "json_schema":
        schema = {"name": "answer", "schema": json.loads(constraint.json_schema), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    value = list(constraint.choice.choices) if which == "choice" else getattr(constraint, which)
    if upstream.family.name == "sglang":
        return {"ebnf" if which == "grammar" else which: value}
    if upstream.family.name == "llama.cpp":
        return {which: value}
    if upstream.family.name == "vllm" and not at_least(upstream.version, 0, 11):
        return {f"guided_{which}": value}
    return {"structured_outputs": {which: value}}


def _message(path: str, message: lm.Message, upstream: Upstream) -> Body:
    body: Body = {"role": ROLES[message.role], "content": message.content}
    if message.parts:
        body["content"] = [{"type": "text", "text": part.text} for part in message.parts]
    if message.name:
        body["name"] = message.name
    if message.tool_call_id:
        body["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
            for call in message.tool_calls
        ]
        body["content"] = body["content"] or None
    if message.reasoning:
        upstream.needs("reasoning_in", f"{path}.reasoning")
        body["reasoning_content"] = message.reasoning
    return body


def _tool(tool: lm.Tool) -> Body:
    function: Body = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json:
        function["parameters"] = json.loads(tool.parameters_json)
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _tool_choice(choice: lm.ToolChoice, upstream: Upstream) -> Body:
    body: Body = {}
    if choice.mode == lm.ToolChoice.MODE_FUNCTION:
        body["tool_choice"] = {"type": "function", "function": {"name": choice.function}}
    elif choice.mode in (lm.ToolChoice.MODE_NONE, lm.ToolChoice.MODE_REQUIRED):
        body["tool_choice"] = "none" if choice.mode == lm.ToolChoice.MODE_NONE else "required"
    if choice.HasField("parallel"):
        body["parallel_tool_calls"] = choice.parallel
    if body:
        upstream.needs("tool_choice", "tool_choice")
    return body
