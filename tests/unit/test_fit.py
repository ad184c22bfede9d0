"""Known speeds with noise in them -> the fit finds them again; what is no speed is refused, with the reason."""

from __future__ import annotations

from random import Random

import pytest

from deploy.planner.fit import Batch, Decode, NoFit, Prefill, batch_s, bounded, fit_encoder, fit_llm, prefill_s, step_s

A800 = {"prefill_tps": 4300.0, "prefill_doubling_ctx": 55_000.0, "step_ms": 27.0, "kv_us_per_ktoken": 45.0}
H20 = {"prefill_tps": 2600.0, "prefill_doubling_ctx": 55_000.0, "step_ms": 12.0, "kv_us_per_ktoken": 12.0}
SIZES = (256, 1024, 8192, 32_000, 100_000)


def points(speed, noise=0.0, fixed_ms=30.0, seed=0):
    random, told = Random(seed), {**speed, "fixed_ms": fixed_ms}
    wobble = lambda: 1 + random.uniform(-noise, noise)  # noqa: E731
    prefills = [Prefill(n, 0, prefill_s(told, n) * wobble()) for n in SIZES]
    held = (64, 30_000, 120_000, 400_000)
    return prefills, [Decode(1, tokens, step_s(told, tokens) * wobble()) for tokens in held]


@pytest.mark.parametrize("speed", [A800, H20])
@pytest.mark.parametrize("seed", range(5))
def test_a_known_speed_is_found_within_ten_per_cent(speed, seed):
    found = fit_llm(*points(speed, noise=0.03, seed=seed)).values
    for name, value in speed.items():
        assert found[name] == pytest.approx(value, rel=0.1 if name != "prefill_doubling_ctx" else 0.15)


def test_without_noise_it_is_exact_and_says_so():
    fit = fit_llm(*points(A800))
    assert fit.values == pytest.approx({**A800, "fixed_ms": 30.0}, rel=1e-6)
    assert max(*fit.error.values(), *fit.worst.values()) < 1e-6


def test_attention_that_was_not_seen_costs_nothing():
    prefills = [Prefill(n, 0, n / 1000) for n in (100, 200, 400)]
    found = fit_llm(prefills, [Decode(1, 0, 0.01), Decode(4, 4000, 0.01)]).values
    assert (found["prefill_doubling_ctx"], found["kv_us_per_ktoken"]) == (1e7, pytest.approx(0, abs=1e-6))


def test_cached_tokens_still_cost_attention():
    told = {**A800, "fixed_ms": 0.0}
    prefills = [Prefill(n, m, prefill_s(told, n, m)) for n, m in ((512, 0), (512, 30_000), (4096, 0), (20_000, 0))]
    found = fit_llm(prefills, [Decode(1, 100, step_s(A800, 100))]).values
    assert found["prefill_doubling_ctx"] == pytest.approx(55_000, rel=0.01)


@pytest.mark.parametrize(
    ("prefills", "said"),
    [
        ([Prefill(100, 0, 0.1)] * 5, "three prompt lengths"),
        ([Prefill(n, 0, 0.5) for n in (100, 1000, 10_000)], "makes no difference"),
        ([Prefill(n, 0, 0.0) for n in (100, 1000, 10_000)], "in no time"),
        ([Prefill(n, 0, (n / 100) ** 4) for n in (100, 1000, 10_000)], "square of the prompt alone"),
    ],
)
def test_what_is_no_speed_is_refused(prefills, said):
    with pytest.raises(NoFit, match=said):
        fit_llm(prefills, [Decode(1, 100, 0.01)])


def test_points_that_do_not_lie_on_the_curve_are_refused():
    with pytest.raises(NoFit, match="decode: half of the points are off by more than"):
        fit_llm(points(A800)[0], [Decode(1, 1000 * n, (0.01, 0.1)[n % 2]) for n in range(4)])


def test_an_encoder_is_a_line():
    fit = fit_encoder([Batch(n, 0.004 + n / 20_000) for n in (8, 128, 1024, 8192)])
    assert fit.values == pytest.approx({"fixed_ms": 4.0, "tokens_per_s": 20_000.0})
    assert batch_s(fit.values, 2000) == pytest.approx(0.104)
    with pytest.raises(NoFit, match="makes no difference"):
        fit_encoder([Batch(n, 0.004) for n in (8, 128, 1024)])


def test_coefficients_are_never_negative():
    assert bounded([(1, 1), (1, 2), (1, 3)], [3.0, 2.0, 1.0])[1] == 0
    assert bounded([(1, 1), (1, 2), (1, 3)], [0.5, 1.5, 2.5])[0] == 0
