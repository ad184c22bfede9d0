"""What the traffic asks of an instance, and how much of it one can take.

At r requests a second an instance prefills for r·p of each second; the rest goes to decode steps, each of which gives
every running request one token. With s the step without load, k the cost of a resident token and L the tokens a request
holds, the time per token T and the running requests b = r·o·T solve

    T (1 − r·p) = s + k·L·b     so     T = s / (1 − r·(p + k·L·o))

(processor sharing between the two phases, Little's law for b). The first token waits for prompts before it as in an
M/D/1 queue, and for a decode step at each chunk of its own. `sim` checks the outcome with the very router.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.planner.roofline import LlmSpeed

CHUNK = 2048  # prompt tokens that go into one step


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests of one length class. `rate` [1/s], `prompt` and `output` [tokens], objectives (inf: none)."""

    rate: float
    prompt: float
    output: float
    ttft_s: float = float("inf")
    tpot_ms: float = float("inf")

    @property
    def length(self) -> int:
        return round(self.prompt + self.output)


@dataclass(frozen=True, slots=True)
class Load:
    """An instance at a rate: `busy` 0 .. 1, times as a request sees them, running requests."""

    rate: float
    busy: float
    ttft_s: float
    tpot_ms: float
    running: float


def load(speed: LlmSpeed, demand: Demand, rate: float) -> Load | None:
    """The steady state at `rate` requests a second; None where there is none: the queue grows."""
    prefill = speed.prefill_s(demand.prompt)
    resident = speed.kv_us_per_ktoken.value / 1e9 * (demand.prompt + demand.output / 2)  # s a step and request
    step = speed.step_ms.value / 1000
    free = 1 - rate * (prefill + resident * demand.output)
    if free <= 0:
        return None
    tpot = step / free
    prefilling = rate * prefill
    wait = prefilling * prefill / (2 * (1 - prefilling))
    first = wait + prefill + (demand.prompt / CHUNK) * min(tpot, 1.0) * prefilling
    return Load(rate, 1 - free, first, tpot * 1000, rate * (demand.output * tpot + first))


def most(speed: LlmSpeed, demand: Demand, concurrent: float) -> float:
    """The highest rate [1/s] at which objectives and KV room hold; 0: not even one request alone."""
    low, high = 0.0, 1 / max(1e-9, speed.prefill_s(demand.prompt))
    idle = load(speed, demand, 0.0)
    if idle is None or not _holds(idle, demand, concurrent):
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        found = load(speed, demand, middle)
        if found is not None and _holds(found, demand, concurrent):
            low = middle
        else:
            high = middle
    return low


def _holds(found: Load, demand: Demand, concurrent: float) -> bool:
    return found.ttft_s <= demand.ttft_s and found.tpot_ms <= demand.tpot_ms and found.running <= concurrent
