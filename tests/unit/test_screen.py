"""What `up` says of a child that was started again."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.launch import screen
from deploy.launch.supervise import Child, State
from deploy.launch.supervisor import Program, Running


def test_a_second_life_is_told_by_its_own_time_and_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(screen.time, "monotonic", lambda: now)
    log, stream = tmp_path / "a.log", io.StringIO()
    running = Running(Program("a", "llm", ("x",), {}, log, tmp_path / "ready"), Child("a"))
    running.facts = {"address": "127.0.0.1:1"}
    shown = screen.Screen(stream)
    shown.begin()

    def becomes(state: State, restarts: int = 0) -> None:
        running.child = replace(running.child, state=state, restarts=restarts)
        shown.changed(running)

    becomes(State.STARTING)
    log.write_text("loading weights\n")
    now += 3
    shown.refresh([running])
    becomes(State.READY)
    log.write_text("loading weights\nserving\n")
    now += 500
    becomes(State.STARTING, restarts=1)
    shown.refresh([running])
    now += 20
    shown.refresh([running])
    with log.open("a") as more:
        more.write("loading anew\n")
    shown.refresh([running])
    becomes(State.READY, restarts=1)
    assert stream.getvalue().splitlines() == [
        "[a] starting (pid 0)",
        "[a] 3 s: loading weights",
        "[a] ready at 127.0.0.1:1 (3 s)",
        "[a] starting again (pid 0)",
        "[a] 20 s: loading anew",
        "[a] ready at 127.0.0.1:1 (20 s, restarted 1×)",
    ]
