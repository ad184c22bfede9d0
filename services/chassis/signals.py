"""When a process is to stop: a signal, a Drain call, which may be taken back. The second signal stops hard."""

from __future__ import annotations

import asyncio
import os
import signal

HARD_EXIT = 130


class Stop:
    """`asked`: to stop; `grace_s` is what a Drain call wished, None for the process's own setting. `undone`: that was
    taken back, and the process serves on as soon as it sees it."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.undone = asyncio.Event()
        self.grace_s: float | None = None
        self._for_good = False

    def ask(self, grace_s: float | None = None) -> None:
        if not self.asked.is_set():
            self.grace_s = grace_s
            self.asked.set()

    def undo(self) -> bool:
        """Takes a Drain call back. False where none is under way, or a signal has asked as well."""
        if not self.asked.is_set() or self._for_good:
            return False
        self.undone.set()
        return True

    def resume(self) -> bool:
        """Whether the process is to serve on; then all is as before it was asked."""
        if not self.undone.is_set() or self._for_good:
            return False
        self.asked.clear()
        self.undone.clear()
        self.grace_s = None
        return True

    def listen(self) -> None:
        """SIGTERM and SIGINT ask; another one of them ends the process at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self._for_good:
            os._exit(HARD_EXIT)
        self._for_good = True
        self.ask()
