"""What the fleet file asks for: traffic and objective as demands on LLMs and encoders."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deploy.fleet import Fleet
from deploy.planner.demand import Demand

PROMPT, OUTPUT, RATE = 2048, 256, 1.0
TTFT_S, TPOT_MS = 2.0, 80.0
SLM_PER_LLM = 4.0  # a balanced deployment: 3 to 5 (seed 001_9fb6dd293e332b2a.txt)
SLM_TOKENS = 512
HEADROOM = 1.2
SHORT_RANGE = 4  # the primary tier serves up to this multiple of the mean prompt


@dataclass(frozen=True, slots=True)
class Wanted:
    """`short` and `long`: requests by length; `encoder`: tokens a second for embedding and rerank together;
    `remarks`: what was assumed."""

    short: Demand
    long: Demand | None
    encoder_rps: float
    encoder_tokens: float
    remarks: tuple[str, ...]

    @property
    def threshold(self) -> int:
        """Tokens of prompt + answer up to which the primary tier serves: a power of two."""
        high = 1024
        while high < SHORT_RANGE * self.short.prompt:
            high *= 2
        return high


def wanted_of(fleet: Fleet) -> Wanted:
    traffic, objective, remarks = fleet.traffic, fleet.routing.objective, []
    ttft = (objective.ttft_s if objective else TTFT_S) or float("inf")
    tpot = (objective.tpot_ms if objective else TPOT_MS) or float("inf")
    if objective is None:
        remarks.append(f"routing.objective is absent: planned for TTFT {TTFT_S:g} s and {TPOT_MS:g} ms a token")
    if traffic is None:
        remarks.append(f"traffic is absent: planned for {RATE:g} request/s of {PROMPT} + {OUTPUT} tokens")
        whole = Demand(RATE, PROMPT, OUTPUT, ttft, tpot)
        rps, tokens, share, far = RATE * SLM_PER_LLM, float(SLM_TOKENS), 0.0, None
    else:
        whole = Demand(traffic.requests_per_s, traffic.prompt_tokens, traffic.output_tokens, ttft, tpot)
        rps = traffic.requests_per_s * (traffic.slm_per_llm or SLM_PER_LLM)
        tokens = traffic.slm_tokens or float(SLM_TOKENS)
        share, far = traffic.long_share, traffic.long_prompt_tokens
    if not far or not share:
        return Wanted(whole, None, rps, tokens, tuple(remarks))
    # Nobody expects the first token of a long prompt at once: its objective grows with its length.
    long = Demand(whole.rate * share, far, whole.output, ttft * far / whole.prompt * 1.25, tpot)
    return Wanted(replace(whole, rate=whole.rate * (1 - share)), long, rps, tokens, tuple(remarks))
