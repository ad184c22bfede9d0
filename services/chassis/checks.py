"""Range checks of requests, the same at the gateway and in every instance. Pure.

The bounds are ours: engines accept `max_tokens=2**63` and `n=16384`. Each function raises `MeshError(INVALID_ARGUMENT)`
that names the field and what is allowed; what only an engine can know (context length, features) is checked there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from infermesh.errors import MeshError, Reason, invalid, unsupported
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import rerank_pb2 as rr
from infermesh.v1.inference_pb2 import Delivery, Hints, Relay

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_N = 128
MAX_STOPS = 16
MAX_INPUTS = 2048
MAX_TOKENS = 1 << 31
MAX_JSON_DEPTH = 64
MAX_PROMPT_IDS = 1 << 20
MAX_UNIX_S = 253_402_300_799  # the end of year 9999, as far as calendars go
_ROLES = frozenset(lm.Role.values()) - {lm.ROLE_UNSPECIFIED}
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")

# field -> (low, high, what is allowed)
_SAMPLING: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 2, "0 .. 2"),
    "top_p": (1e-6, 1, "above 0, at most 1"),
    "top_k": (-1, 1 << 20, "-1 (all) or at least 1"),
    "min_p": (0, 1, "0 .. 1"),
    "presence_penalty": (-2, 2, "-2 .. 2"),
    "frequency_penalty": (-2, 2, "-2 .. 2"),
    "repetition_penalty": (1e-6, 2, "above 0, at most 2"),
    "max_tokens": (1, MAX_TOKENS, f"1 .. {MAX_TOKENS}"),
    "min_tokens": (0, MAX_TOKENS, f"0 .. {MAX_TOKENS}"),
    "n": (1, MAX_N, f"1 .. {MAX_N}"),
    "logprobs": (0, 20, "0 .. 20"),
    "prompt_logprobs": (0, 20, "0 .. 20"),
}


def check_chat(request: lm.ChatRequest) -> None:
    if not request.messages:
        raise invalid("messages", "at least one message is needed")
    _at_most("messages", request.messages, MAX_MESSAGES)
    for index, message in enumerate(request.messages):
        _message(f"messages[{index}]", message)
    if request.continue_final_message:
        if request.messages[-1].role != lm.ROLE_ASSISTANT:
            raise invalid("continue_final_message", "the last message must be the assistant's")
        if request.HasField("add_generation_prompt") and request.add_generation_prompt:
            raise invalid("add_generation_prompt", "excludes continue_final_message")
    _tools(request)
    if request.template_args_json:
        args = check_json("template_args_json", request.template_args_json)
        if not isinstance(args, dict):
            raise invalid("template_args_json", "must be a JSON object")
    _generation(request)


def check_complete(request: lm.CompleteRequest) -> None:
    which = request.WhichOneof("prompt")
    if which is None or (which == "text" and not request.text) or (which == "token_ids" and not request.token_ids.ids):
        raise invalid("prompt", "must not be empty")
    if which == "token_ids":
        _at_most("prompt", request.token_ids.ids, MAX_PROMPT_IDS)
    if request.suffix:
        raise unsupported("suffix", "completion with a suffix is not served")
    _generation(request)


def check_embed(request: em.EmbedRequest) -> None:
    if bool(request.texts) == bool(request.token_ids):
        raise invalid("texts", "give either texts or token_ids, and at least one")
    _at_most("texts" if request.texts else "token_ids", request.texts or request.token_ids, MAX_INPUTS)
    for index, text in enumerate(request.texts):
        if not text:
            raise invalid(f"texts[{index}]", "must not be empty")
    for index, ids in enumerate(request.token_ids):
        if not ids.ids:
            raise invalid(f"token_ids[{index}]", "must not be empty")
        _at_most(f"token_ids[{index}]", ids.ids, MAX_PROMPT_IDS)
    if request.task and request.prefix:
        raise invalid("prefix", "excludes task")
    if request.token_ids and (request.task or request.prefix):
        raise invalid("task" if request.task else "prefix", "cannot be put before token_ids; send texts")
    check_hints(request.hints)


def check_rerank(request: rr.RerankRequest) -> None:
    if not request.query:
        raise invalid("query", "must not be empty")
    if not request.documents:
        raise invalid("documents", "at least one document is needed")
    _at_most("documents", request.documents, MAX_INPUTS)
    check_hints(request.hints)


def check_hints(hints: Hints) -> None:
    for name in ("document_id", "session_id"):
        if len(getattr(hints, name).encode()) > 256:
            raise invalid(f"hints.{name}", "at most 256 bytes")
    _within("hints.priority", hints.priority, -100, 100, "-100 .. 100")


def check_relay(relay: Relay) -> None:
    """What a gateway sent, seen by an instance."""
    if len(relay.cache_salt) > 64:
        raise invalid("relay.cache_salt", "at most 64 bytes")
    _at_most("relay.prefix_chain", relay.prefix_chain, 1 << 16)
    _within("relay.rendered_at", relay.rendered_at, 0, MAX_UNIX_S, "unix seconds, 0 .. year 9999")


def check_json(param: str, text: str) -> object:
    """Parses JSON of bounded depth.

    Raises:
        MeshError: INVALID_ARGUMENT, for text that is not JSON, is deeper than 64, or holds NaN or Infinity.
    """
    if json_depth(text) > MAX_JSON_DEPTH:
        raise invalid(param, f"JSON deeper than {MAX_JSON_DEPTH} levels")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise invalid(param, f"not JSON: {error}") from None


def json_depth(text: str | bytes) -> int:
    """The deepest nesting of brackets outside strings (an upper bound where there are few), without recursion."""
    data = text.encode() if isinstance(text, str) else text
    brackets = data.count(b"[") + data.count(b"{")
    if brackets <= MAX_JSON_DEPTH:
        return brackets
    depth = deepest = 0
    for token in _BRACKET_OR_STRING.finditer(data):
        first = data[token.start()]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
    return deepest


_BRACKET_OR_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _message(path: str, message: lm.Message) -> None:
    if message.role not in _ROLES:
        raise invalid(f"{path}.role", "must be system, developer, user, assistant or tool")
    for index, part in enumerate(message.parts):
        which = part.WhichOneof("part")
        if which == "image_url":
            raise unsupported(f"{path}.content[{index}]", "image inputs are not served")
        if which is None:
            raise invalid(f"{path}.content[{index}]", "a part needs text")
    if message.role == lm.ROLE_TOOL and not message.tool_call_id:
        raise invalid(f"{path}.tool_call_id", "a tool's answer names the call")
    for index, call in enumerate(message.tool_calls):
        if call.arguments_json:
            check_json(f"{path}.tool_calls[{index}].arguments", call.arguments_json)


def _tools(request: lm.ChatRequest) -> None:
    _at_most("tools", request.tools, MAX_TOOLS)
    names = set()
    for index, tool in enumerate(request.tools):
        if not _NAME.fullmatch(tool.name):
            raise invalid(f"tools[{index}].name", "1 to 64 characters of a-z A-Z 0-9 _ . -")
        names.add(tool.name)
        if tool.parameters_json and not isinstance(
            check_json(f"tools[{index}].parameters", tool.parameters_json), dict
        ):
            raise invalid(f"tools[{index}].parameters", "must be a JSON schema object")
    choice = request.tool_choice
    if choice.mode in (lm.ToolChoice.MODE_REQUIRED, lm.ToolChoice.MODE_FUNCTION) and not request.tools:
        raise invalid("tool_choice", "needs tools")
    if choice.mode == lm.ToolChoice.MODE_FUNCTION and choice.function not in names:
        raise invalid("tool_choice.function", f"{choice.function!r} is not among the tools")


def _generation(request: lm.ChatRequest | lm.CompleteRequest) -> None:
    """What chat and completion share."""
    if request.lora:
        raise unsupported("lora", "LoRA adapters are not served")
    check_sampling(request.sampling)
    _constraint(request.constraint)
    check_hints(request.hints)
    check_delivery(request.delivery)


def check_sampling(sampling: lm.Sampling) -> None:
    for name, (low, high, allowed) in _SAMPLING.items():
        if sampling.HasField(name):  # type: ignore[arg-type]
            _within(f"sampling.{name}", getattr(sampling, name), low, high, allowed)
    if (
        sampling.HasField("min_tokens")
        and sampling.HasField("max_tokens")
        and sampling.min_tokens > sampling.max_tokens
    ):
        raise invalid("sampling.min_tokens", "must not be above max_tokens")
    _at_most("sampling.stop", sampling.stop, MAX_STOPS)
    for index, stop in enumerate(sampling.stop):
        if not 1 <= len(stop.encode()) <= 1024:
            raise invalid(f"sampling.stop[{index}]", "1 .. 1024 bytes")
    _at_most("sampling.stop_token_ids", sampling.stop_token_ids, 64)
    _at_most("sampling.logit_bias", sampling.logit_bias, 1024)
    for token, bias in sampling.logit_bias.items():
        _within(f"sampling.logit_bias[{token}]", bias, -100, 100, "-100 .. 100")
    if sampling.n > 1 and sampling.HasField("temperature") and sampling.temperature == 0:
        raise invalid("sampling.n", "must be 1 at temperature 0: every choice would be the same")


def check_delivery(delivery: Delivery) -> None:
    _within("delivery.min_interval_ms", delivery.min_interval_ms, 0, 10_000, "0 .. 10000")


def _constraint(constraint: lm.Constraint) -> None:
    which = constraint.WhichOneof("constraint")
    if which in ("json_schema", "structural_tag"):
        check_json(f"constraint.{which}", getattr(constraint, which))
    elif which in ("regex", "grammar") and not getattr(constraint, which):
        raise invalid(f"constraint.{which}", "must not be empty")
    elif which == "choice":
        if not constraint.choice.choices or not all(constraint.choice.choices):
            raise invalid("constraint.choice", "at least one choice, none of them empty")
        _at_most("constraint.choice", constraint.choice.choices, 256)


def _within(param: str, value: float, low: float, high: float, allowed: str) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise invalid(param, f"{value} is out of range: {allowed}")


def _at_most(param: str, values: Sequence[object] | object, bound: int) -> None:
    if len(values) > bound:  # type: ignore[arg-type]
        raise invalid(param, f"{len(values)} entries, at most {bound}")  # type: ignore[arg-type]


def too_long(tokens: int, context: int) -> MeshError:
    """The prompt does not fit the model at all, here or anywhere."""
    return MeshError(
        Reason.CONTEXT_LENGTH_EXCEEDED,
        f"the prompt has {tokens} tokens, this model takes {context} tokens of prompt and answer together",
        param="messages",
    )
