"""Lets a process run for half of the time, like a card half as fast: `python -m tests.bench.half_speed PID`.

SIGCONT and SIGSTOP in turn, until the process is gone or this one is told to end; it then runs on. A turn that a busy
host made longer is made up for by the opposite one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

TURN_S = 0.01


def main(pid: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ahead = 0.0  # seconds that it ran longer than it was stopped
    try:
        while True:
            ahead += _turn(pid, signal.SIGCONT, TURN_S - min(0.0, ahead))
            ahead -= _turn(pid, signal.SIGSTOP, max(0.0, ahead))
    except (ProcessLookupError, KeyboardInterrupt):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _turn(pid: int, what: signal.Signals, seconds: float) -> float:
    """How long it really was."""
    os.kill(pid, what)
    begun = time.monotonic()
    time.sleep(seconds)
    return time.monotonic() - begun


if __name__ == "__main__":
    main(int(sys.argv[1]))
