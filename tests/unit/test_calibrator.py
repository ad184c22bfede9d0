"""The instance measures itself, with probes that keep to a known speed: no clock, no server."""

from __future__ import annotations

from random import Random

import pytest

from deploy.planner.fit import Batch, Decode, NoFit, Prefill, batch_s, prefill_s, step_s
from infermesh.errors import MeshError
from registry.endpoint import Capacity, Endpoint
from services.chassis.arrivals import Arrivals
from services.chassis.calibrate import Calibrator, decodings, lengths
from services.chassis.probes import Stream, step_of

A800 = {
    "prefill_tps": 4300.0,
    "prefill_doubling_ctx": 55_000.0,
    "step_ms": 27.0,
    "kv_us_per_ktoken": 45.0,
    "fixed_ms": 30.0,
}
MINILM = {"fixed_ms": 4.0, "tokens_per_s": 20_000.0}


class Known:
    """Probes that take what the speed says, give or take a few per cent, and now and then far longer."""

    def __init__(self, speed, arrivals, *, noise=0.04, others=0):
        self.speed, self.arrivals, self.noise, self.others = speed, arrivals, noise, others
        self.random = Random(7)
        self.asked = []

    def took(self, seconds, requests=1):
        for _ in range(requests + (self.random.random() < self.others)):
            with self.arrivals.enter(None):
                pass
        slow = 3.0 if self.random.random() < 0.07 else 1.0
        return seconds * slow * (1 + self.random.uniform(-self.noise, self.noise))

    async def learn(self):
        pass

    async def prefill(self, tokens):
        self.asked.append(tokens)
        return Prefill(tokens, 0, self.took(prefill_s(self.speed, tokens)))

    async def decode(self, streams, tokens):
        return Decode(streams, streams * tokens, self.took(step_s(self.speed, streams * tokens), streams))

    async def batch(self, rows, tokens):
        return Batch(rows * tokens, self.took(batch_s(self.speed, rows * tokens)))


def calibrator(capacity, arrivals, kind="llm"):
    endpoint = Endpoint(id="a800-1-a", kind=kind, host="127.0.0.1", port=1, model="m", capacity=capacity)
    return Calibrator(lambda: endpoint, arrivals, lambda: "127.0.0.1:1")


CAPACITY = Capacity(context_max=131_072, max_running=256, kv_tokens=468_000)


async def test_a_known_llm_is_found_within_ten_per_cent():
    arrivals = Arrivals()
    probes = Known(A800, arrivals)
    steps = [step async for step in calibrator(CAPACITY, arrivals)._llm(probes, CAPACITY, quick=False)]
    found = steps[-1].found
    for name in ("prefill_tps", "step_ms"):
        assert found.fit.values[name] == pytest.approx(A800[name], rel=0.1)
    assert found.fit.values["prefill_doubling_ctx"] == pytest.approx(A800["prefill_doubling_ctx"], rel=0.25)
    assert all(one.error < 0.1 for one in found.held_out) and len(found.held_out) == 2
    assert {1024, 8192, 32_768, int(0.92 * 131_072)} <= set(probes.asked)
    progress = [step.progress for step in steps]
    assert progress == sorted(progress) and progress[0] == 0 and progress[-1] == 1
    assert found.report()["held_out"][0]["what"].startswith("TTFT of ")


async def test_a_known_encoder_is_found_within_ten_per_cent():
    arrivals, capacity = Arrivals(), Capacity(context_max=256)
    probes = Known(MINILM, arrivals)
    steps = [step async for step in calibrator(capacity, arrivals, "embedding")._encoder(probes, capacity, quick=False)]
    found = steps[-1].found
    assert found.fit.values == pytest.approx(MINILM, rel=0.1)
    assert len(found.held_out) == 3 and all(one.error < 0.1 for one in found.held_out)


async def test_a_measurement_that_somebody_else_fell_into_is_taken_again():
    arrivals = Arrivals()
    quiet, crowded = Known(A800, arrivals, others=0.1), Known(A800, arrivals, others=1)
    assert [step async for step in calibrator(CAPACITY, arrivals)._llm(quiet, CAPACITY, quick=True)][-1].found
    with pytest.raises(MeshError, match=r"requests of others came.*infermesh ban a800-1-a"):
        [step async for step in calibrator(CAPACITY, arrivals)._llm(crowded, CAPACITY, quick=True)]


async def test_an_instance_that_works_for_others_is_not_measured():
    arrivals = Arrivals()
    with arrivals.enter(None), pytest.raises(MeshError, match="1 requests of others run here"):
        [step async for step in calibrator(CAPACITY, arrivals)._llm(Known(A800, arrivals), CAPACITY, quick=True)]


@pytest.mark.parametrize(
    ("capacity", "quick", "expected"),
    [
        (CAPACITY, False, [256, 1024, 8192, 32_768, 120_586]),
        (CAPACITY, True, [256, 1024, 8192]),
        (Capacity(context_max=4096), False, [256, 1024, 1884, 3768]),
        (Capacity(context_min=16_384, context_max=131_072), False, [30_146, 32_768, 60_293, 120_586]),
        (Capacity(context_max=131_072, kv_tokens=10_000), False, [256, 1024, 4600, 9200]),
        (Capacity(), True, [256, 1024, 8192]),
    ],
)
def test_lengths_fit_the_range(capacity, quick, expected):
    assert lengths(capacity, quick=quick) == expected


def test_a_range_that_is_too_narrow_is_refused():
    with pytest.raises(NoFit, match="too narrow a range"):
        lengths(Capacity(context_max=100), quick=False)


def test_what_is_decoded_fits_the_cache_and_the_batch():
    for capacity in (CAPACITY, Capacity(context_max=4096, max_running=4, kv_tokens=6000), Capacity(context_max=4096)):
        found = decodings(capacity, lengths(capacity, quick=False))
        assert len(found) >= 2
        for streams, tokens in found:
            assert streams * tokens <= 0.6 * (capacity.kv_tokens or 1 << 20) + 256
            assert streams <= (capacity.max_running or 256)


def test_a_pace_is_taken_while_all_decode():
    early = Stream(0.0, [(0.1 * n, n) for n in range(1, 60)], prompt=100)
    late = Stream(0.0, [(2.0 + 0.1 * n, n) for n in range(1, 60)], prompt=300)
    pace = step_of([early, late])
    assert pace.seconds == pytest.approx(0.1) and pace.streams == 2
    assert 400 < pace.resident < 520
    assert step_of([early, Stream(0.0, [(5.5, 1), (9.0, 50)], prompt=1)]) is None
