"""Seconds until an instance would be done: named formulas of numbers."""

from __future__ import annotations

from dataclasses import dataclass

from registry.endpoint import Endpoint, Speed

# What stands for a number that nobody has told: a middling card. Never 0, never infinite.
PRIOR_PREFILL_TPS = 2000.0
PRIOR_STEP_MS = 40.0
PRIOR_SLOTS = 16  # requests that share a decode step, where max_running is unknown
MAX_SLOTS = 64  # beyond this a step slows down about as fast as it fills up
PRIOR_FIXED_MS = 5.0
PRIOR_TOKENS_PER_S = 5000.0


@dataclass(frozen=True, slots=True)
class Rates:
    """One instance's speed, made once an endpoint: tokens a second of prompt and of output, seconds a request."""

    prompt_tps: float
    output_tps: float
    fixed_s: float
    weight: float


def rates(endpoint: Endpoint, weight: float = 1.0) -> Rates:
    """`weight` is the gateway's own static factor; the endpoint's multiplies in."""
    speed: Speed = endpoint.speed
    factor = weight * endpoint.weight
    if endpoint.kind != "llm":
        fixed_ms = PRIOR_FIXED_MS if speed.fixed_ms is None else speed.fixed_ms
        return Rates(speed.tokens_per_s or PRIOR_TOKENS_PER_S, PRIOR_TOKENS_PER_S, fixed_ms / 1000, factor)
    slots = min(endpoint.capacity.max_running or PRIOR_SLOTS, MAX_SLOTS)
    step_s = (speed.step_ms or PRIOR_STEP_MS) / 1000
    return Rates(speed.prefill_tps or PRIOR_PREFILL_TPS, slots / step_s, 0.0, factor)


def work_seconds(rates: Rates, queued_prompt: int, queued_output: int, prompt: int, output: int) -> tuple[float, ...]:
    """Least outstanding work: (seconds of prompts, seconds of outputs, fixed seconds), this request's among them."""
    return (
        (queued_prompt + prompt) / rates.prompt_tps,
        (queued_output + output) / rates.output_tps,
        rates.fixed_s,
    )


TERMS = ("prompt", "output", "fixed")
