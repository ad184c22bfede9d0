"""Every term of the estimate, as a table of numbers."""

from __future__ import annotations

import math

import pytest

from registry.endpoint import Endpoint, Speed
from services.gateway.routing import cost
from services.gateway.routing.rates import GUESS, TRUST, rates


@pytest.mark.parametrize(
    ("tokens", "cached", "seconds"),
    [(0, 0, 0.0), (1000, 0, 0.101), (1000, 9500, 0.12), (50_000, 0, 7.5), (1, 49_999.5, 0.0002)],
)
def test_prefill_grows_with_context(tokens: int, cached: float, seconds: float) -> None:
    assert cost.prefill_s(tokens, cached, tps=10_000, doubling_ctx=50_000) == pytest.approx(seconds)


@pytest.mark.parametrize(("resident", "seconds"), [(0, 0.027), (100_000, 0.0315), (468_000, 0.04806)])
def test_a_step_follows_resident_tokens(resident: int, seconds: float) -> None:
    assert cost.step_s(0.027, 45e-9, resident) == pytest.approx(seconds)


@pytest.mark.parametrize(("step", "tps", "factor"), [(0.0, 4300, 1.0), (0.027, 4300, 1.0567), (0.02, 25_000, 1.2441)])
def test_decoding_slows_prefill(step: float, tps: float, factor: float) -> None:
    assert cost.interference(step, tps) == pytest.approx(factor, abs=1e-4)


def test_room_is_free_when_enough_requests_have_ended() -> None:
    slot = cost.slot_wait_s(mean_output=200, step=0.03, running=60)
    assert slot == pytest.approx(0.1)  # 60 requests of 6 s: one ends every 0.1 s
    assert cost.slot_wait_s(200, 0.03, 0) == pytest.approx(6.0)
    assert cost.kv_wait_s(missing=-1, resident=60_000, running=60, slot_wait=slot) == 0.0
    assert cost.kv_wait_s(missing=10, resident=60_000, running=60, slot_wait=slot) == pytest.approx(0.1)
    assert cost.kv_wait_s(missing=5000, resident=60_000, running=60, slot_wait=slot) == pytest.approx(0.5)


@pytest.mark.parametrize(("backlog", "factor"), [(0.0, 1.0), (4.0, 1 + 4 * cost.PRICE_PER_S)])
def test_uncached_work_is_dearer_where_others_wait(backlog: float, factor: float) -> None:
    assert cost.price(backlog) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("decoding", "work", "growth", "seconds"), [(0, 1.0, 0.1, 0.0), (-1, 1.0, 0.1, 0.0), (40, 0.5, 0.05, 22.0)]
)
def test_a_prompt_delays_everybody_who_decodes_there(decoding: int, work: float, growth: float, seconds: float) -> None:
    assert cost.delayed_s(decoding, work, growth) == pytest.approx(seconds)


@pytest.mark.parametrize(("load", "seconds"), [(0.0, 0.0), (0.5, 2.0), (0.75, 6.0), (5.0, 18.0)])
def test_short_work_pays_for_the_long_prompts_it_delays(load: float, seconds: float) -> None:
    assert cost.reserve_s(2.0, load) == pytest.approx(seconds)


def test_unknown_speeds_are_priors() -> None:
    unknown = rates(Endpoint("a", "llm", "h", 1, "m"))
    assert 0 < unknown.prefill(1000) < math.inf and 0 < unknown.step(1000) < math.inf and not unknown.told
    encoder = rates(Endpoint("a", "embedding", "h", 1, "m", speed=Speed(fixed_ms=10, tokens_per_s=1000)))
    assert encoder.prefill(500) == pytest.approx(0.51) and encoder.step(10**6) == 0.0


@pytest.mark.parametrize("told", [True, False])
def test_the_online_correction_is_slow_and_bounded(told: bool) -> None:
    speed = Speed(prefill_tps=1000, step_ms=20) if told else Speed()
    learning = rates(Endpoint("a", "llm", "h", 1, "m", speed=speed))
    thought = learning.prefill(1000)
    learning.observe_prefill(100 * thought, thought)
    assert 1.0 < learning.slowness < 1.06  # one odd answer
    for _ in range(500):
        learning.observe_prefill(1.5 * thought, learning.prefill(1000))
    assert learning.prefill(1000) == pytest.approx(1.5 * thought, rel=0.01)
    for _ in range(2000):
        learning.observe_prefill(1000 * thought, thought)
        learning.observe_step(1e-6, 1.0)
    low, high = TRUST if told else GUESS
    assert (learning.slowness, learning.step_slowness) == (high, low)
    learning.observe_prefill(0.0, 1.0)
    assert learning.slowness == high
