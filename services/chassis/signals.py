"""When a process is to stop: a signal, a Drain call. The second signal stops hard."""

from __future__ import annotations

import asyncio
import os
import signal

HARD_EXIT = 130


class Stop:
    """`asked` is set once; `grace_s` is what a Drain call wished, None for the process's own setting."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.grace_s: float | None = None

    def ask(self, grace_s: float | None = None) -> None:
        if not self.asked.is_set():
            self.grace_s = grace_s
            self.asked.set()

    def listen(self) -> None:
        """SIGTERM and SIGINT ask; another one of them ends the process at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self.asked.is_set():
            os._exit(HARD_EXIT)
        self.ask()
