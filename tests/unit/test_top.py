"""`infermesh top`: what it shows, and that it lives in a real terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from typing import Any

from rich.console import Console

from infermesh.cli import top_view
from infermesh.v1.mesh_pb2 import Group, Instance
from infermesh.v1.worker_pb2 import Load
from tests.kit.children import ROOT


def instance(id: str, state: str = "healthy", steps: int = 0, model: str = "m", why: str = "", **load: Any) -> Instance:
    return Instance(
        id=id,
        kind="llm",
        model=model,
        state=state,
        address="127.0.0.1:1",
        rejected_reason=why,
        incarnation=7,
        metadata={"device": "H20-96G", "device_count": "8"},
        load=Load(steps=steps, **load),
    )


def printed(
    rows: list[top_view.Row],
    sort: str = "id",
    note: str = "",
    height: int = 40,
    width: int = 140,
    groups: tuple[Group, ...] = (),
) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(top_view.screen(rows, sort, note, width, height, groups))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_row_tells_load_and_pace_and_what_nobody_told_is_a_dash() -> None:
    before = [instance("a", steps=100)]
    now = [instance("a", steps=150, running=3, waiting=1, kv_used_ratio=0.5), instance("b", "lost")]
    rows = top_view.rows(now, before, 2.0)
    assert rows[0].steps_s == 25 and rows[1].steps_s is None
    text = printed(rows)
    assert "1 of 2 healthy · 3 running · 1 waiting" in text and "8 × H20-96G" in text
    (line,) = [line for line in text.splitlines() if line.startswith("a ")]
    assert line.split()[5:] == ["3", "1", "0", "25.0", "██████░░░░░░", "50%", "127.0.0.1:1"]
    (line,) = [line for line in text.splitlines() if line.startswith("b ")]
    assert line.split()[5:8] == ["-", "-", "0"]


def test_scaled_groups_tell_what_there_is_and_what_is_wanted() -> None:
    why = "more: prefill 81% used, 1.8 s of prompts wait for each"
    short = Group(name="chat-a800", least=1, most=4, desired=3, replicas=2, use=0.81, short="prefill", why=why)
    new = Group(name="embed", least=1, most=2)
    rows = top_view.rows([instance("a")], [], 0.0)
    text = printed(rows, groups=(short, new))
    told = [line.split() for line in text.splitlines() if line.startswith(("chat-a800", "embed"))]
    assert told[0] == ["chat-a800", "2", "3", "1-4", "81%", "prefill", *why.split()]
    assert told[1] == ["embed", "0", "-", "1-2", "-"]
    assert "GROUP" not in printed(rows) and why not in printed(rows, width=80, groups=(short,))
    assert (
        len(
            printed(
                top_view.rows([instance(f"i{n:02}") for n in range(30)], [], 0.0), height=15, groups=(short,)
            ).splitlines()
        )
        <= 15
    )


def test_eighty_columns_cut_no_number_off() -> None:
    rows = top_view.rows([instance("embedding-12", "healthy", running=12, waiting=3, kv_used_ratio=0.5)], [], 0.0)
    text = printed(rows, width=80)
    assert "…" not in text and "ADDRESS" not in text and "███░░░  50%" in text, text


def test_another_life_has_no_pace_yet() -> None:
    other = instance("a", steps=10)
    other.incarnation = 8
    (row,) = top_view.rows([other], [instance("a", steps=100)], 1.0)
    assert row.steps_s is None


def test_order_models_reasons_and_a_short_terminal() -> None:
    full = instance("full", kv_used_ratio=0.97, running=1)
    busy = instance("busy", kv_used_ratio=0.2, running=9)
    bad = instance("x", "rejected", model="", why="port 22 is no port of ours")
    rows = top_view.rows([bad, busy, full], [], 0.0)
    first = {sort: top_view.ordered(rows, sort)[0].id for sort in top_view.SORTS}
    assert first == {"id": "busy", "state": "x", "running": "busy", "kv": "full"}
    text = printed(rows, note="as it was 3 s ago")
    assert "m      llm   2/2   10" in text and "x: port 22 is no port of ours" in text and "as it was 3 s ago" in text
    many = top_view.rows([instance(f"i{number:02}") for number in range(30)], [], 0.0)
    short = printed(many, height=15)
    assert "i05" in short and "i29" not in short and "and 24 more" in short


def test_in_a_terminal_without_a_gateway_it_says_so_and_q_ends_it() -> None:
    master, slave = pty.openpty()
    words = [sys.executable, "-P", "-m", "infermesh.cli", "top", "--gateway", "127.0.0.1:1", "--interval", "0.2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen(
        words, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=ROOT, start_new_session=True
    )
    os.close(slave)
    seen = b""
    try:
        deadline = time.monotonic() + 60
        while b"no gateway answers" not in seen and time.monotonic() < deadline:
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)
        assert b"no gateway answers" in seen, seen[-2000:]
        os.write(master, b"sq")
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # nobody has the other end any more
                if select.select([master], [], [], 0.2)[0]:
                    seen += os.read(master, 4096)
        assert process.poll() == 0, seen[-2000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(master)


def test_without_a_terminal_it_looks_once(capfd: Any) -> None:
    words = [sys.executable, "-P", "-m", "infermesh.cli", "top"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run: Any = {"env": env, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
    gone = subprocess.run([*words, "--gateway", "127.0.0.1:1"], **run)
    assert gone.returncode == 1 and "no gateway answers" in gone.stderr and "Traceback" not in gone.stderr
    assert subprocess.run([*words, "--sort", "x"], **run).returncode == 2
