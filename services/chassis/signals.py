"""When a process is to stop: a signal, a Drain call, which may be taken back. The second signal stops hard."""

from __future__ import annotations

import asyncio
import os
import signal

HARD_EXIT = 130


class Stop:
    """`asked`: to stop; `grace_s` is what a Drain call wished, None for the process's own setting. `undone`: that was
    taken back, and the process serves on as soon as it sees it; who asks anew before that is heard after it."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.undone = asyncio.Event()
        self.grace_s: float | None = None
        self._for_good = False
        self._anew = False  # asked since it was taken back

    def ask(self, grace_s: float | None = None) -> None:
        if not self.asked.is_set() or self.undone.is_set():
            self.grace_s = grace_s
            self._anew = self.asked.is_set()
            self.asked.set()

    def undo(self) -> bool:
        """Takes a Drain call back. False where none is under way, or a signal has asked as well."""
        if not self.asked.is_set() or self._for_good:
            return False
        self._anew = False
        self.undone.set()
        return True

    def resume(self) -> bool:
        """Whether the process is to serve on; then all is as before it was asked, or it has been asked anew: work that
        was no longer waited for is waited for again."""
        if not self.undone.is_set():
            return False
        self.undone.clear()
        if not self._anew:
            self.asked.clear()
            self.grace_s = None
        self._anew = False
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
