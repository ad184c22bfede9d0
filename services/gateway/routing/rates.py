"""An instance's speed as the router uses it: what was declared or measured, times a bounded correction learned online.

The correction is slow (a single odd answer moves it by 5 %) and bounded, so that a wrong observation never makes an
instance look idle or dead.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

from registry.endpoint import Endpoint
from services.chassis.granting import DEPTH_S, GUESSED_DEPTH_S
from services.gateway.routing import cost

LEARN = 0.05  # of the newest observation
TRUST = (0.5, 2.0)  # the correction's bounds where somebody told the speed
GUESS = (0.05, 20.0)  # where it is the prior
ODD = 3.0  # a single observation counts as no further off than this
SAMPLE_TOKENS = 2000


@dataclass(slots=True)
class Rates:
    """`slowness` and `step_slowness`: observed over told, 1 = as told. `weight`: the operator's factor."""

    tps: float
    doubling_ctx: float
    step_base_s: float
    kv_s: float  # seconds a step for a resident token
    fixed_s: float
    weight: float
    told: bool
    slowness: float = 1.0
    step_slowness: float = 1.0
    sample_s: float = 0.0  # of a middling uncached prompt
    depth_s: float = 0.0  # of prompts that are kept queued there

    def __post_init__(self) -> None:
        self.sample_s = self.prefill(SAMPLE_TOKENS) / self.weight
        self.depth_s = DEPTH_S if self.told else GUESSED_DEPTH_S

    def prefill(self, tokens: float, cached: float = 0.0) -> float:
        return self.fixed_s + self.slowness * cost.prefill_s(tokens, cached, self.tps, self.doubling_ctx)

    def step(self, resident: float) -> float:
        return self.step_slowness * cost.step_s(self.step_base_s, self.kv_s, resident)

    def interference(self, step: float) -> float:
        return cost.interference(step, self.tps) if step else 1.0

    def observe_prefill(self, seen_s: float, thought_s: float) -> None:
        """Both from dispatch to first token, waits included."""
        self.slowness = self._moved(self.slowness, seen_s, thought_s)

    def observe_step(self, seen_s: float, thought_s: float) -> None:
        self.step_slowness = self._moved(self.step_slowness, seen_s, thought_s)

    def _moved(self, factor: float, seen: float, thought: float) -> float:
        if seen <= 0 or thought <= 0:
            return factor
        low, high = TRUST if self.told else GUESS
        ratio = min(max(seen / thought, 1 / ODD), ODD)
        return min(max(factor * exp(LEARN * log(ratio)), low), high)


def rates(endpoint: Endpoint, weight: float = 1.0) -> Rates:
    """`weight` is the gateway's own static factor; the endpoint's multiplies in."""
    speed = endpoint.speed
    factor = weight * endpoint.weight
    if endpoint.kind != "llm":
        fixed_ms = cost.PRIOR_FIXED_MS if speed.fixed_ms is None else speed.fixed_ms
        tps = speed.tokens_per_s or cost.PRIOR_TOKENS_PER_S
        return Rates(tps, float("inf"), 0.0, 0.0, fixed_ms / 1000, factor, speed.tokens_per_s is not None)
    kv_us = cost.PRIOR_KV_US_PER_KTOKEN if speed.kv_us_per_ktoken is None else speed.kv_us_per_ktoken
    return Rates(
        tps=speed.prefill_tps or cost.PRIOR_PREFILL_TPS,
        doubling_ctx=speed.prefill_doubling_ctx or cost.PRIOR_DOUBLING_CTX,
        step_base_s=(speed.step_ms or cost.PRIOR_STEP_MS) / 1000,
        kv_s=kv_us / 1e9,
        fixed_s=0.0,
        weight=factor,
        told=speed.prefill_tps is not None,
    )
