"""The bodies that REST callers send, as OpenAI, vLLM, Jina and Cohere name their fields.

Validation is strict (`"5"` is not 5) and checks shape only; ranges are the contract's business. A null means "not
given", as everywhere in OpenAI's API. What no model here names is refused by name, unless it stands in `IGNORED`
(accepted without effect, reported in `x-infermesh-ignored`) or has a value in `NEUTRAL` that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "verbosity", "prediction",
    "prompt_cache_retention", "prompt_cache_options", "include_obfuscation",
})  # fmt: skip

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "continuous_usage_stats": (False,),
    "modalities": (["text"],),
    "bad_words": ([],),
    "functions": ([],),
    "annotations": ([],),
    "audio": ({},),
}

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise PydanticCustomError("strings", "must be a string or a list of strings")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("text"), str) and value.keys() <= {"text"}:
        text: str = value["text"]
        return text
    raise PydanticCustomError("document", "must be a string or an object with nothing but a `text`")


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return value
    return [_text(value)]


def _arguments(value: Any) -> Any:
    if not isinstance(value, str):
        raise PydanticCustomError("json_text", "must be a string that holds JSON")
    return value


Strings = Annotated[Any, AfterValidator(_strings)]
Text = Annotated[Any, AfterValidator(_text)]
Texts = Annotated[list[Text], Field()]


class Shape(BaseModel):
    """A JSON object whose unknown fields are refused by name."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL
    known: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls.known = frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.known
        return {
            key: item
            for key, item in value.items()
            if item is not None and (key in known or (key not in IGNORED and item not in cls.neutral.get(key, ())))
        }


class StreamOptions(Shape):
    include_usage: bool = False


class StructuredOutputs(Shape):
    schema_: Any = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
    }


class Generation(Shape):
    """What chat and completion share."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int64 | None = None
    max_tokens: Int64 | None = None
    min_tokens: Int64 | None = None
    n: Int64 | None = None
    stop: Strings = None
    stop_token_ids: list[UInt32] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: Int32 | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: Any = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    return_token_ids: bool | None = None
    prompt_cache_key: str | None = None
    session_id: str | None = None
    priority: Int32 | None = None
    lora: str | None = None


class Function(Shape):
    name: str
    arguments: Annotated[Any, AfterValidator(_arguments)] = ""


class ToolCallShape(Shape):
    id: str = ""
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None  # left over from a stream


class MessageShape(Shape):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[ToolCallShape] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class ToolFunction(Shape):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolShape(Shape):
    type: Literal["function"] = "function"
    function: ToolFunction


class ChatBody(Generation):
    messages: list[MessageShape]
    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    tools: list[ToolShape] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL | {"echo": (False,), "add_special_tokens": (False,)}


class CompletionBody(Generation):
    prompt: Any
    logprobs: Int32 | None = None
    echo: bool | None = None
    suffix: str | None = None
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL | {"suffix": ("",), "add_special_tokens": (True,)}


class EmbeddingBody(Shape):
    model: str
    input: Any
    dimensions: UInt32 | None = None
    encoding_format: Literal["float", "base64"] = "float"
    truncate_prompt_tokens: Int32 | None = None
    truncation_side: Literal["left", "right"] | None = None
    normalize: bool | None = None
    task: str | None = None
    prompt_name: str | None = None
    prefix: str | None = None
    session_id: str | None = None
    priority: Int32 | None = None


class RerankBody(Shape):
    model: str
    query: Text
    documents: Texts
    top_n: UInt32 | None = None
    return_documents: bool = False
    max_tokens_per_doc: UInt32 | None = None
    truncate_prompt_tokens: Int32 | None = None
    raw_scores: bool | None = None
    use_activation: bool | None = None
    priority: Int32 | None = None
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"max_chunks_per_doc": (1,), "truncate": (True,)}


class ScoreBody(Shape):
    model: str
    text_1: Annotated[Any, AfterValidator(_texts)] = None
    text_2: Annotated[Any, AfterValidator(_texts)] = None
    queries: Annotated[Any, AfterValidator(_texts)] = None
    documents: Annotated[Any, AfterValidator(_texts)] = None
    items: Annotated[Any, AfterValidator(_texts)] = None
    data_1: Annotated[Any, AfterValidator(_texts)] = None
    data_2: Annotated[Any, AfterValidator(_texts)] = None
    max_tokens_per_doc: UInt32 | None = None
    truncate_prompt_tokens: Int32 | None = None
    raw_scores: bool | None = None
    use_activation: bool | None = None
    priority: Int32 | None = None


class TokenizeBody(Shape):
    model: str
    prompt: str | None = None
    messages: list[MessageShape] | None = None
    tools: list[ToolShape] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeBody(Shape):
    model: str
    tokens: list[Any]
