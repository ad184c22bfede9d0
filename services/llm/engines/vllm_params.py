"""Sampling and constraints of a request -> vLLM's SamplingParams. Nothing here touches an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from infermesh.v1 import language_model_pb2 as lm

# Fields whose absence means the model's own default (its generation_config), then vLLM's.
_DEFAULTED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def sampling_params(
    sampling: lm.Sampling,
    defaults: Mapping[str, Any],
    max_tokens: int,
    *,
    structured: StructuredOutputsParams | None = None,
    keep_special_tokens: bool = False,
    prompt_logprobs: int | None = None,
    more_stops: Sequence[str] = (),
) -> SamplingParams:
    """`defaults` are the model's; `keep_special_tokens` is for parsers that must see them."""
    given: dict[str, Any] = {name: defaults[name] for name in _DEFAULTED if defaults.get(name) is not None}
    given |= {name: _plain(getattr(sampling, name)) for name in _DEFAULTED if sampling.HasField(name)}  # type: ignore[arg-type]
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if sampling.n > 1 and given.get("temperature") == 0:
        given.pop("temperature")  # a greedy model default; n choices were asked for and greedy ones would be equal
    if sampling.HasField("seed"):
        given["seed"] = sampling.seed
    if sampling.HasField("logprobs"):
        given["logprobs"] = sampling.logprobs
    if prompt_logprobs is not None:
        given["prompt_logprobs"] = prompt_logprobs
    skip = sampling.skip_special_tokens if sampling.HasField("skip_special_tokens") else True
    return SamplingParams(
        n=sampling.n or 1,
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        stop=list(dict.fromkeys([*sampling.stop, *more_stops])) or None,
        stop_token_ids=list(dict.fromkeys([*sampling.stop_token_ids, *defaults.get("stop_token_ids", ())])) or None,
        include_stop_str_in_output=sampling.include_stop,
        ignore_eos=sampling.ignore_eos,
        logit_bias={token: _plain(bias) for token, bias in sampling.logit_bias.items()} or None,
        skip_special_tokens=skip and not keep_special_tokens,
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA,
        **given,
    )


def structured_outputs(constraint: lm.Constraint) -> StructuredOutputsParams | None:
    which = constraint.WhichOneof("constraint")
    match which:
        case "json_schema":
            return StructuredOutputsParams(json=constraint.json_schema)
        case "choice":
            return StructuredOutputsParams(choice=list(constraint.choice.choices))
        case "json_object":
            return StructuredOutputsParams(json_object=True) if constraint.json_object else None
        case "regex" | "grammar" | "structural_tag":
            return StructuredOutputsParams(**{which: getattr(constraint, which)})
    return None


def _plain(value: float) -> float:
    """float32 of the wire as the decimal that was meant: 0.7, not 0.699999988079071."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
