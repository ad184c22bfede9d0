"""Plain Python values -> request messages. Pure; faults of the caller's own code are TypeErrors and ValueErrors."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import rerank_pb2 as rr
from infermesh.v1 import retrieve_pb2 as rt

Messages = str | Sequence[Mapping[str, Any] | lm.Message]
TextOrIds = str | Sequence[int]
Inputs = str | Sequence[str] | Sequence[Sequence[int]]


# A text, or {id, text, vector, document_id, position}; `vector`: floats, or packed float32 as bytes.
Passage = str | Mapping[str, Any] | rt.Passage


class SamplingOptions(TypedDict, total=False):
    """How to sample; ranges as in language_model.proto. What is absent is the model's default."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    logit_bias: Mapping[int, float]
    skip_special_tokens: bool


class Extras(TypedDict, total=False):
    """What chat and completion take beside sampling: at most one constraint, and hints about where to run."""

    json_schema: Mapping[str, Any] | str
    regex: str
    grammar: str
    choice: Sequence[str]
    json_object: bool
    document_id: str
    session_id: str
    priority: int
    degrade: bool
    ttft_target_ms: int
    token_ids: bool  # ask for token ids beside the text
    min_interval_ms: int  # merge events of a stream


class Options(SamplingOptions, Extras, total=False):
    """All of it."""


_CONSTRAINTS = ("json_schema", "regex", "grammar", "choice", "json_object")
_HINTS = ("document_id", "session_id", "priority", "ttft_target_ms")


def chat_request(
    messages: Messages,
    model: str,
    options: Mapping[str, Any],
    *,
    tools: Iterable[Mapping[str, Any]] = (),
    tool_choice: str = "",
    template_args: Mapping[str, Any] | None = None,
) -> lm.ChatRequest:
    """`tools` and `messages` have OpenAI's shapes. `tool_choice`: none, auto, required or a tool's name."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    request = lm.ChatRequest(model=model, messages=[message(turn) for turn in turns])
    for tool in tools:
        function = tool.get("function", tool)
        request.tools.append(
            lm.Tool(
                name=function["name"],
                description=function.get("description", ""),
                parameters_json=_json(function.get("parameters", "")),
                strict=bool(function.get("strict", False)),
            )
        )
    if tool_choice:
        modes = {"none": "MODE_NONE", "auto": "MODE_AUTO", "required": "MODE_REQUIRED"}
        request.tool_choice.mode = lm.ToolChoice.Mode.Value(modes.get(tool_choice, "MODE_FUNCTION"))
        request.tool_choice.function = "" if tool_choice in modes else tool_choice
    if template_args is not None:
        request.template_args_json = json.dumps(template_args)
    _generation(request, options)
    return request


def complete_request(
    prompt: TextOrIds, model: str, options: Mapping[str, Any], *, echo: bool = False
) -> lm.CompleteRequest:
    request = lm.CompleteRequest(model=model, echo=echo)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    _generation(request, options)
    return request


def embed_request(
    inputs: Inputs,
    model: str,
    *,
    dimensions: int = 0,
    normalize: bool | None = None,
    truncation: str = "",
    task: str = "",
    prefix: str = "",
    max_tokens: int = 0,
) -> em.EmbedRequest:
    request = em.EmbedRequest(model=model, dimensions=dimensions, task=task, prefix=prefix, max_tokens=max_tokens)
    for item in [inputs] if isinstance(inputs, str) else inputs:
        if isinstance(item, str):
            request.texts.append(item)
        else:
            request.token_ids.append(inf.TokenIds(ids=item))
    if normalize is not None:
        request.normalize = normalize
    request.truncation = truncation_of(truncation)
    return request


def rerank_request(
    query: str,
    documents: Sequence[str],
    model: str,
    *,
    top_n: int = 0,
    return_documents: bool = False,
    raw_scores: bool = False,
    truncation: str = "",
) -> rr.RerankRequest:
    return rr.RerankRequest(
        model=model,
        query=query,
        documents=documents,
        top_n=top_n,
        return_documents=return_documents,
        raw_scores=raw_scores,
        truncation=truncation_of(truncation),
    )


_ANSWER = (
    *("rerank_top", "chat_model", "embedding_model", "rerank_model", "instructions", "question_task", "passage_task"),
)


def answer_request(question: str, passages: Iterable[Passage], options: Mapping[str, Any]) -> rt.AnswerRequest:
    """`options`: fields of AnswerRequest, of chat's options those without a constraint; `shown` is AnswerRequest's
    top_k, since `top_k` is how to sample."""
    rest = dict(options)
    request = rt.AnswerRequest(question=question, top_k=rest.pop("shown", 0))
    for name in _ANSWER:
        setattr(request, name, rest.pop(name, request.DESCRIPTOR.fields_by_name[name].default_value))
    request.candidates.extend(map(passage, passages))
    request.pinned.extend(map(passage, rest.pop("pinned", ())))
    template_args = rest.pop("template_args", None)
    if template_args is not None:
        request.template_args_json = json.dumps(template_args)
    _generation(request, rest)
    return request


def passage(given: Passage) -> rt.Passage:
    """One passage of a request."""
    if isinstance(given, rt.Passage):
        return given
    if isinstance(given, str):
        return rt.Passage(text=given)
    fields = dict(given)
    vector = fields.pop("vector", None)
    made = rt.Passage(**fields)
    if vector is not None:
        made.vector.packed = vector if isinstance(vector, bytes) else _packed(vector)
    return made


def _packed(vector: Iterable[float]) -> bytes:
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def tokenize_request(text: Messages, model: str, *, add_special_tokens: bool | None = None) -> lm.TokenizeRequest:
    """A text, or a conversation as chat would see it."""
    request = lm.TokenizeRequest(model=model)
    if isinstance(text, str):
        request.text = text
    else:
        request.chat.messages.extend(message(turn) for turn in text)
    if add_special_tokens is not None:
        request.add_special_tokens = add_special_tokens
    return request


def truncation_of(word: str) -> em.Truncation.ValueType:
    """none | end | start; empty: the service's default."""
    try:
        return em.Truncation.Value(f"TRUNCATION_{(word or 'unspecified').upper()}")
    except ValueError:
        raise ValueError(f"truncation {word!r} is not one of none, end, start") from None


def message(turn: Mapping[str, Any] | lm.Message) -> lm.Message:
    """One turn of a conversation, in OpenAI's shape."""
    if isinstance(turn, lm.Message):
        return turn
    role = str(turn.get("role", ""))
    try:
        built = lm.Message(role=lm.Role.Value(f"ROLE_{role.upper()}"), name=turn.get("name") or "")
    except ValueError:
        raise ValueError(f"role {role!r} is not one of system, developer, user, assistant, tool") from None
    content = turn.get("content")
    if isinstance(content, str):
        built.content = content
    for part in () if content is None or isinstance(content, str) else content:
        url = part.get("image_url")
        if url is None:
            built.parts.append(lm.ContentPart(text=part["text"]))
        else:
            built.parts.append(lm.ContentPart(image_url=url if isinstance(url, str) else url["url"]))
    for call in turn.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = _json(function.get("arguments", ""))
        built.tool_calls.append(lm.ToolCall(id=call.get("id", ""), name=function["name"], arguments_json=arguments))
    built.tool_call_id = turn.get("tool_call_id") or ""
    built.reasoning = turn.get("reasoning") or ""
    return built


def _generation(request: lm.ChatRequest | lm.CompleteRequest | rt.AnswerRequest, options: Mapping[str, Any]) -> None:
    """Sampling, hints and delivery, and the constraint where the request takes one."""
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}; there are {', '.join(Options.__annotations__)}")
    given = [name for name in _CONSTRAINTS if options.get(name) not in (None, False)]
    if len(given) > 1:
        raise TypeError(f"{' and '.join(given)} exclude each other")
    for name, value in options.items():
        if value is None or name in _CONSTRAINTS:
            continue
        if name in _HINTS:
            setattr(request.hints, name, value)
        elif name == "degrade":
            request.hints.degrade = inf.DEGRADE_ALLOW if value else inf.DEGRADE_NEVER
        elif name in ("token_ids", "min_interval_ms"):
            setattr(request.delivery, name, value)
        elif name == "logit_bias":
            request.sampling.logit_bias.update(value)
        elif name in ("stop", "stop_token_ids"):
            getattr(request.sampling, name).extend([value] if isinstance(value, str) else value)
        else:
            setattr(request.sampling, name, value)
    if isinstance(request, rt.AnswerRequest):
        if given:
            raise TypeError(f"an answer from passages takes no {given[0]}")
        return
    for name in given:
        if name == "choice":
            request.constraint.choice.SetInParent()  # no choice at all is refused by the mesh, not dropped here
            request.constraint.choice.choices.extend(options["choice"])
        else:
            value = options[name]
            setattr(request.constraint, name, _json(value) if name == "json_schema" else value)


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
