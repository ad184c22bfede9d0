"""What the operator sees of a starting mesh: a live table on a terminal, plain lines elsewhere. On standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from deploy.launch.logs import tail
from deploy.launch.supervise import State
from deploy.launch.supervisor import Running

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

LAST_WORDS = 15  # log lines shown of a child that died
REPEAT_S = 10.0  # a plain line about a child that is still loading, no more often than this


class Screen:
    """`changed` is told of every state; `refresh` comes several times a second."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live: Live | None = None
        self._started = time.monotonic()
        self._begun: dict[str, float] = {}  # when a child's present life began
        self._said: dict[str, tuple[str, float]] = {}

    def begin(self) -> None:
        self._started = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), auto_refresh=False, transient=True)
            self._live.start()

    def end(self) -> None:
        """From here on there are lines only."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def changed(self, running: Running) -> None:
        child, id = running.child, running.program.id
        if child.state is State.READY:
            again = f", restarted {child.restarts}×" if child.restarts else ""
            self.say(f"[{id}] ready at {running.address} ({self._elapsed(id)}{again})")
        elif child.state in (State.BACKOFF, State.FAILED):
            self.last_words(running)
        elif child.state is State.STOPPED and child.exit_code == 0 and child.ever_ready:
            self.say(f"[{id}] has left")
        elif child.state is State.STARTING:
            self._begins(running)

    def _begins(self, running: Running) -> None:
        child, id = running.child, running.program.id
        self._begun[id] = time.monotonic()
        self._said[id] = (_last_word(running), 0.0)  # of the life before: no news of this one
        if self._live is None:
            self.say(f"[{id}] {'starting again' if child.restarts else 'starting'} (pid {running.pid})")

    def last_words(self, running: Running) -> None:
        """Why a child died, as far as its log tells."""
        child, id = running.child, running.program.id
        for line in tail(running.program.log, LAST_WORDS):
            self.say(f"[{id}] | {line[:400]}")
        how = f"signal {-(child.exit_code or 0)}" if (child.exit_code or 0) < 0 else f"exit code {child.exit_code}"
        if child.state is State.FAILED:
            self.say(f"[{id}] ended with {how} and is given up; the whole log: {running.program.log}")
        else:
            wait = max(0.0, child.restart_at - child.since)
            self.say(f"[{id}] ended with {how}; starting again in {wait:.1f} s; the whole log: {running.program.log}")

    def refresh(self, children: Iterable[Running]) -> None:
        """How far the loading ones have come."""
        if self._live is not None:
            self._live.update(self._table(children), refresh=True)
            return
        for running in children:
            if running.child.state is not State.STARTING:
                continue
            text = _last_word(running)
            said, when = self._said.get(running.program.id, ("", 0.0))
            if text and text != said and time.monotonic() - when >= REPEAT_S:
                self._said[running.program.id] = (text, time.monotonic())
                self.say(f"[{running.program.id}] {self._elapsed(running.program.id)}: {text}")

    def _table(self, children: Iterable[Running]) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, title=f"starting, {self._elapsed()}", title_justify="left")
        for column in ("id", "state", ""):
            table.add_column(column, overflow="ellipsis", no_wrap=True)
        for running in children:
            words = tail(running.program.log, 1) if running.child.state is State.STARTING else [running.address]
            table.add_row(running.program.id, running.child.state.value, Text(words[0] if words else ""))
        return table

    def _elapsed(self, id: str = "") -> str:
        return f"{time.monotonic() - self._begun.get(id, self._started):.0f} s"


def _last_word(running: Running) -> str:
    words = tail(running.program.log, 1)
    return words[0][:600] if words else ""
