"""Seconds until an instance would answer: every term a named function of numbers.

Prefill is compute: n new tokens after m cached ones cost n / prefill_tps, and attention doubles that at
`prefill_doubling_ctx` tokens of context. Decode is memory: a step reads the weights and all resident KV.
"""

from __future__ import annotations

from services.chassis.granting import STEP_TOKENS

# What stands for a number that nobody has told: a middling card. Never 0, never infinite.
PRIOR_PREFILL_TPS = 2000.0
PRIOR_DOUBLING_CTX = 50_000.0
PRIOR_STEP_MS = 40.0
PRIOR_KV_US_PER_KTOKEN = 30.0
PRIOR_FIXED_MS = 5.0
PRIOR_TOKENS_PER_S = 5000.0

PRICE_PER_S = 1.0  # β: what a second of backlog adds to the price of a second of uncached work
DECODE_SHARE = 0.02  # γ: what a second of anybody's decoding weighs beside a second before the first token
BESIDE_SHARE = 0.08  # the same where tokens come in steps many times as long: it is seen, and breaks objectives
RESERVED_AT_MOST = 0.9  # of an instance's time, for long prompts


def prefill_s(tokens: float, cached: float, tps: float, doubling_ctx: float) -> float:
    """Seconds to compute `tokens` new prompt tokens behind `cached` ones; cached tokens still cost attention."""
    return tokens / tps * (1.0 + (cached + tokens / 2) / doubling_ctx)


def step_s(base_s: float, kv_s_per_token: float, resident: float) -> float:
    """Seconds of a decode step with `resident` tokens in the KV cache of running requests."""
    return base_s + kv_s_per_token * resident


def interference(step: float, tps: float) -> float:
    """How much longer prefill takes on an engine that decodes beside it: each chunk's step carries a decode step."""
    return 1.0 + step * tps / STEP_TOKENS


def delayed_s(decoding: int, work: float, growth: float) -> float:
    """Seconds by which all `decoding` requests together end later: steps that carry the prompt last `work` longer in
    all, and its KV cache makes each later step longer, by `growth` in all."""
    return max(0, decoding) * (work + growth)


def slot_wait_s(mean_output: float, step: float, running: int) -> float:
    """Seconds until one of `running` requests ends, where every slot is taken."""
    return mean_output * step / max(1, running)


def kv_wait_s(missing: float, resident: float, running: int, slot_wait: float) -> float:
    """Seconds until `missing` tokens of KV room are free: as many requests must end as hold them."""
    return slot_wait * max(1.0, missing * max(1, running) / max(1.0, resident)) if missing > 0 else 0.0


def price(backlog_s: float) -> float:
    """What a second of uncached work costs, when `backlog_s` of it wait at each instance: others wait too."""
    return 1.0 + PRICE_PER_S * backlog_s


def preempt_s(work: float, overtaken: int) -> float:
    """By how much those who are overtaken end later, together."""
    return work * overtaken


def beside_s(left: float, output: int, step: float) -> float:
    """By how much an answer of `output` tokens ends later, at its share, while the `left` seconds of a long prompt are
    computed beside it: each of its tokens takes one of those steps."""
    return BESIDE_SHARE * min(left, output * step)


def reserve_s(work: float, load: float) -> float:
    """The delay that `work` means for long prompts, which keep `load` (0..1) of the instance busy by themselves."""
    held = min(load, RESERVED_AT_MOST)
    return work * held / (1.0 - held)
