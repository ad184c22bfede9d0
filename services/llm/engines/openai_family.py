"""What the servers that speak OpenAI's API have of their own, beyond it. Pure.

Servers drop unknown fields in silence, so a field is sent only to a family that is known to obey it, under the name it
has there; to the others it is refused by name. Sources: each project's own API documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Fields of Sampling that OpenAI's own API has, by the same name.
STANDARD = frozenset({"temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "stop"})


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of server. `sampling`: further fields of Sampling -> the server's names.

    `features` beside the constraints: n, logprobs, logit_bias, tools, tool_choice, template_args, continue_final,
    reasoning_in, echo, prompt_ids, prefix_salt, usage_each (usage in every chunk), token_ids, tokenize, tokenize_chat.
    """

    name: str
    sampling: Mapping[str, str] = field(default_factory=dict)
    features: frozenset[str] = frozenset()


_RICH = {
    name: name for name in ("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos")
} | {"skip_special_tokens": "skip_special_tokens"}
_OPENAI = ("n", "logprobs", "logit_bias", "tools", "tool_choice", "json_schema", "json_object", "echo", "prompt_ids")

OPENAI = Family("openai", {}, frozenset(_OPENAI))
VLLM = Family(
    "vllm",
    _RICH | {"include_stop": "include_stop_str_in_output"},
    frozenset(
        (
            *(*_OPENAI, "regex", "grammar", "choice", "structural_tag", "template_args", "continue_final"),
            *("reasoning_in", "prefix_salt", "usage_each", "token_ids", "tokenize", "tokenize_chat"),
        )
    ),
)
SGLANG = Family(
    "sglang",
    _RICH | {"include_stop": "no_stop_trim"},
    frozenset(
        (*_OPENAI, "regex", "grammar", "template_args", "continue_final", "reasoning_in", "usage_each", "tokenize")
    ),
)
LLAMA_CPP = Family(
    "llama.cpp",
    {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty", "ignore_eos": "ignore_eos"},
    frozenset(
        (
            *("logprobs", "logit_bias", "tools", "tool_choice", "json_schema", "json_object", "grammar", "prompt_ids"),
            *("template_args", "reasoning_in", "tokenize"),
        )
    ),
)
OLLAMA = Family("ollama", {}, frozenset(("tools", "json_schema", "json_object")))
# Our own gateway: its REST face takes vLLM's names.
INFERMESH = Family("infermesh", VLLM.sampling, VLLM.features - {"prefix_salt", "usage_each"})

_BY_OWNER = {
    "vllm": VLLM,
    "sglang": SGLANG,
    "llamacpp": LLAMA_CPP,
    "llama.cpp": LLAMA_CPP,
    "llama-box": LLAMA_CPP,
    "library": OLLAMA,
    "ollama": OLLAMA,
    "infermesh": INFERMESH,
}


def family_of(owner: str) -> Family:
    """By `owned_by` of the server's model list; one that nobody knows speaks OpenAI's API and no more."""
    return _BY_OWNER.get(owner.lower(), OPENAI)


def at_least(version: str, *wanted: int) -> bool:
    """Whether a version like 0.11.2.dev3 is that or later; an unreadable one is taken as current."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[: len(wanted)])
    return not numbers or numbers >= wanted
