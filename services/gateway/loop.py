"""How long single turns hold the event loop, measured where it waits: between two calls of the selector.

A sampling task would see a hold only by its own delay, and wake the loop for nothing. Here a turn costs two readings
of two clocks (under a microsecond). What counts is a turn's wall time, but no more than the CPU time that this thread
used in it: on a shared machine the rest was somebody else's.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any

WINDOW_S = 10.0


class HoldMeter(selectors.DefaultSelector):
    """The loop's selector, which keeps the longest turn. Times in seconds.

    `longest`, `longest_wall`: since `reset`; the second counts also what the machine took away. `recent`: of the last
    10 to 20 s.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets what was, e.g. what loading libraries held."""
        self.longest = self.longest_wall = 0.0
        self._window = self._window_before = 0.0
        self._since = self._woke = time.perf_counter()
        self._used = time.thread_time()

    @property
    def recent(self) -> float:
        return max(self._window, self._window_before)

    def select(self, timeout: float | None = None) -> Any:
        now = time.perf_counter()
        wall = now - self._woke
        if wall > self.longest_wall:
            self.longest_wall = wall
        if wall > self._window:
            held = min(wall, time.thread_time() - self._used)
            self._window = max(self._window, held)
            self.longest = max(self.longest, held)
        if now - self._since > WINDOW_S:
            self._window_before, self._window, self._since = self._window, 0.0, now
        events = super().select(timeout)
        self._woke = time.perf_counter()
        self._used = time.thread_time()
        return events


def run_metered(main: Callable[[HoldMeter], Coroutine[Any, Any, int]]) -> int:
    """`asyncio.run` on a loop with a meter."""
    meter = HoldMeter()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(meter)) as runner:
        return runner.run(main(meter))
