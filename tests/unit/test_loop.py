import asyncio
import time

from services.gateway.loop import HoldMeter, run_metered


def spin(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_long_turn_is_seen_and_a_pause_of_the_thread_is_told_apart():
    meters: list[HoldMeter] = []

    async def main(meter: HoldMeter) -> int:
        meters.append(meter)
        await asyncio.sleep(0)
        meter.reset()
        await asyncio.sleep(0.01)
        assert meter.longest < 0.01
        time.sleep(0.08)  # noqa: ASYNC251 - what a busy machine does to us
        await asyncio.sleep(0)
        assert meter.longest < 0.05 < meter.longest_wall
        spin(0.06)
        await asyncio.sleep(0)
        return 7

    assert run_metered(main) == 7
    assert meters[0].longest >= 0.05
    assert meters[0].recent >= 0.05


def test_waiting_is_not_holding():
    async def main(meter: HoldMeter) -> int:
        meter.reset()
        await asyncio.sleep(0.1)
        return round(meter.longest * 1000)

    assert run_metered(main) < 50
