"""Requests -> token ids, as the model was trained to see them: vLLM's renderer without its HTTP server."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from vllm.config import ModelConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.inputs import tokens_input
from vllm.renderers import BaseRenderer, TokenizeParams
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import StructuredOutputsParams

from infermesh.errors import invalid, unsupported
from infermesh.v1 import language_model_pb2 as lm
from services.llm.engines.vllm_params import structured_outputs
from services.llm.prompt_template import message_text, refuse_jinja_arguments, render, template_time
from services.llm.settings import VllmOptions

COUNTED_CONTEXTS = 4  # prompts are counted exactly up to so many times the context, and then no longer tokenised
_ROLES = {
    lm.ROLE_SYSTEM: "system",
    lm.ROLE_USER: "user",
    lm.ROLE_ASSISTANT: "assistant",
    lm.ROLE_TOOL: "tool",
    lm.ROLE_DEVELOPER: "developer",
}
_OURS = frozenset(
    {"chat_template", "tokenize", "conversation", "messages", "tools", "strftime_now", "add_generation_prompt"}
    | {"continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding"}
    | {"truncation", "max_length", "tokenizer_kwargs"}
)


@dataclass(slots=True)
class Prompt:
    """What goes into the engine, and what it takes to read the answer."""

    ids: list[int]
    engine_input: Any
    text: str = ""  # for echo
    structured: StructuredOutputsParams | None = None
    keep_special_tokens: bool = False
    request: ChatCompletionRequest | None = None  # what vLLM's parsers look at
    make_parser: Callable[[], Any] | None = None
    reasoning: dict[str, Any] = field(default_factory=dict)  # further arguments of `generate`
    ends_reasoning: Callable[[list[int]], bool | None] | None = None  # its `reasoning_ended`, after other tokens
    strip_space: bool = False
    stops: tuple[str, ...] = ()

    def after(self, done: list[int]) -> tuple[Any, dict[str, Any]]:
        """What the engine is given, and the further arguments, to go on after so much of the answer."""
        ids = [*self.ids, *done]
        reasoning = dict(self.reasoning)
        if self.ends_reasoning is not None:
            reasoning["reasoning_ended"] = self.ends_reasoning(ids)
        return tokens_input(ids, cache_salt=self.engine_input.get("cache_salt")), reasoning


class _Request(ChatCompletionRequest):
    """vLLM cuts prompts off just over the context; callers are owed the count."""

    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        return _tokenize_params(model_config.max_model_len, add_special_tokens=False)


class Renderer:
    def __init__(
        self, options: VllmOptions, model_config: ModelConfig, renderer: BaseRenderer, chat_template: str | None
    ) -> None:
        """
        Raises:
            TypeError, KeyError: a parser that vLLM does not know or that does not fit the tokenizer.
        """
        self._options = options
        self._model_config = model_config
        self._renderer = renderer
        self._online = OnlineRenderer(
            model_config,
            renderer,
            request_logger=None,
            chat_template=chat_template,
            chat_template_content_format="auto",
            enable_auto_tools=bool(options.tool_parser),
            tool_parser=options.tool_parser or None,
            # Arguments follow the schema of the tool also where `strict` is absent: a call that does not is no use.
            tool_strict_level="parameter",
            reasoning_parser=options.reasoning_parser or None,
        )

    async def chat(self, request: lm.ChatRequest, now: float) -> Prompt:
        """`now`: unix seconds, used where no gateway fixed the time."""
        at = template_time(request.relay.rendered_at, now, self._options.time_granularity_s)
        _refuse_tools(request, self._options.tool_parser)
        asked = _chat_completion_request(request, at)
        asked.structured_outputs = structured_outputs(request.constraint)
        if self._options.prompt_template is not None:
            return await self._four_part(request, asked, at)
        _, inputs = _unwrap(await self._online.render_chat(asked))
        prompt = Prompt(
            list(inputs[0]["prompt_token_ids"]),
            inputs[0],
            structured=asked.structured_outputs,  # a tool parser may have put its own in place
            keep_special_tokens=not asked.skip_special_tokens,
        )
        return self._with_parser(prompt, asked)

    async def complete(self, request: lm.CompleteRequest) -> Prompt:
        """Without `text` where token ids were given."""
        salt = _salt(request.relay.cache_salt)
        if request.WhichOneof("prompt") == "token_ids":
            ids = list(request.token_ids.ids)
            self._renderer.validate_token_ids(ids, parameter="prompt")
            prompt = Prompt(ids, tokens_input(ids, cache_salt=salt))
        else:
            prompt = await self._text(request.text, salt)
        prompt.structured = structured_outputs(request.constraint)
        prompt.reasoning = {"reasoning_ended": True}  # a completion has none, so a grammar need not wait for its end
        return prompt

    async def tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return (await self._text(text, None, add_special_tokens=add_special_tokens)).ids

    async def _four_part(self, request: lm.ChatRequest, asked: ChatCompletionRequest, at: int) -> Prompt:
        template = self._options.prompt_template
        assert template is not None
        refuse_jinja_arguments(request)
        rendered = render(
            template,
            request.messages,
            at,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )
        prompt = await self._text(rendered.text, _salt(request.relay.cache_salt))
        prompt.structured = asked.structured_outputs
        prompt.strip_space = rendered.strip_space
        if template.sep.strip() and template.sep.strip() != self._renderer.get_tokenizer().eos_token:
            prompt.stops = (template.sep.strip(),)
        return self._with_parser(prompt, asked)

    async def _text(self, text: str, salt: str | None, *, add_special_tokens: bool = True) -> Prompt:
        params = _tokenize_params(self._model_config.max_model_len, add_special_tokens=add_special_tokens)
        extras = {"cache_salt": salt} if salt else None
        (engine_input,) = await self._renderer.render_cmpl_async([{"prompt": text}], params, prompt_extras=extras)
        return Prompt(list(engine_input["prompt_token_ids"]), engine_input, text)

    def _with_parser(self, prompt: Prompt, asked: ChatCompletionRequest) -> Prompt:
        kind = self._online.parser
        if kind is None:
            return prompt
        arguments = self._online.effective_chat_template_kwargs(asked)
        tokenizer = self._renderer.get_tokenizer()

        def make() -> Any:
            return kind(tokenizer, asked.tools, chat_template_kwargs=arguments, model_config=self._model_config)

        parser = make()
        prompt.request = asked
        prompt.make_parser = make
        prompt.ends_reasoning = lambda ids: asked.resolve_reasoning_ended(parser, ids)
        prompt.reasoning = {"reasoning_ended": prompt.ends_reasoning(prompt.ids)}
        if parser.reasoning_parser is not None:
            # They travel to the engine's process, where a function cannot go.
            plain = {name: value for name, value in arguments.items() if not callable(value)}
            prompt.reasoning["reasoning_parser_kwargs"] = {"chat_template_kwargs": plain}
        return prompt


def _chat_completion_request(request: lm.ChatRequest, at: int) -> ChatCompletionRequest:
    arguments = json.loads(request.template_args_json) if request.template_args_json else {}
    if taken := sorted(_OURS & arguments.keys()):
        raise invalid("template_args_json", f"{', '.join(taken)} cannot be set here")
    # Templates that print the date call this; the clock of the moment would give every request a prefix of its own.
    arguments["strftime_now"] = lambda form: datetime.fromtimestamp(at, UTC).strftime(form)
    generation_prompt = request.add_generation_prompt if request.HasField("add_generation_prompt") else True
    tools = [_tool(tool) for tool in request.tools]
    asked = _Request(
        messages=[],
        stream=True,
        add_generation_prompt=generation_prompt and not request.continue_final_message,
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=arguments,
        cache_salt=_salt(request.relay.cache_salt),
        parallel_tool_calls=request.tool_choice.parallel if request.tool_choice.HasField("parallel") else True,
        **({"tools": tools, "tool_choice": _tool_choice(request)} if tools else {}),
    )
    # Not through its validation, which tries every shape of message that OpenAI ever had: 4,096 of them would hold the
    # loop, and these were built here.
    asked.messages = [_message(message) for message in request.messages]
    return asked


def _refuse_tools(request: lm.ChatRequest, tool_parser: str) -> None:
    mode = request.tool_choice.mode
    if not request.tools or mode == lm.ToolChoice.MODE_NONE:
        return
    if not tool_parser:
        raise unsupported("tools", "this instance has no tool parser; start it with --tool-parser NAME")
    forced = mode in (lm.ToolChoice.MODE_REQUIRED, lm.ToolChoice.MODE_FUNCTION)
    if forced and request.constraint.WhichOneof("constraint"):
        raise unsupported("constraint", "excludes a forced tool call, which has a shape of its own")


def _tool_choice(request: lm.ChatRequest) -> Any:
    match request.tool_choice.mode:
        case lm.ToolChoice.MODE_NONE:
            return "none"
        case lm.ToolChoice.MODE_REQUIRED:
            return "required"
        case lm.ToolChoice.MODE_FUNCTION:
            return {"type": "function", "function": {"name": request.tool_choice.function}}
    return "auto"


def _tool(tool: lm.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json:
        function["parameters"] = json.loads(tool.parameters_json)
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _message(message: lm.Message) -> dict[str, Any]:
    text = message_text(message)
    plain: dict[str, Any] = {"role": _ROLES[message.role], "content": text}
    if message.parts:
        plain["content"] = [{"type": "text", "text": part.text} for part in message.parts]
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json or "{}"},
            }
            for call in message.tool_calls
        ]
        plain["content"] = plain["content"] or None
    for name in ("name", "tool_call_id", "reasoning"):
        if value := getattr(message, name):
            plain[name] = value
    return plain


def _tokenize_params(context: int, *, add_special_tokens: bool) -> TokenizeParams:
    return TokenizeParams(
        max_total_tokens=COUNTED_CONTEXTS * context, max_output_tokens=0, add_special_tokens=add_special_tokens
    )


def _salt(salt: bytes) -> str | None:
    return salt.hex() or None


def _unwrap(result: Any) -> Any:
    if isinstance(result, tuple):
        return result
    raise invalid("messages", result.error.message)
