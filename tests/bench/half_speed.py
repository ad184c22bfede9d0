"""Lets a process run for half of the time, like a card half as fast: `python -m tests.bench.half_speed PID`.

SIGSTOP and SIGCONT in turn, 10 ms each, until the process is gone or this one is told to end; it then runs on.
"""

from __future__ import annotations

import os
import signal
import sys
import time

TURN_S = 0.01


def main(pid: int) -> None:
    def leave(*_: object) -> None:
        os.kill(pid, signal.SIGCONT)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    due = time.monotonic()
    try:
        while True:
            for turn in (signal.SIGSTOP, signal.SIGCONT):
                os.kill(pid, turn)
                due = max(due + TURN_S, time.monotonic())  # what a busy host made us lose is not caught up
                time.sleep(due - time.monotonic() if due > time.monotonic() else 0.0)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
