"""Processes of the mesh as real children: `infermesh VERB … --ready-file`, each in a session of its own.

    with Children(folder) as children:
        gateway = children.start("gateway", "--grpc", "127.0.0.1:0", "--http", "")
        gateway.address, gateway.kill(), gateway.text() ...

Whatever still runs at the end of the block is asked to leave, and must do so well; engines that a killed one left
behind go with its session.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0  # real models load
LEAVE_S = 20.0


def infermesh(*words: str, python: str = sys.executable) -> list[str]:
    """The command line of a verb, as `up` starts it."""
    return [python, "-P", "-m", "infermesh.cli", *words]


def leave_nothing_when_told_to_stop() -> None:
    """For programs of ours that have children: SIGTERM becomes an exit, on whose way they are ended."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def environment(root: Path = ROOT, **more: str) -> dict[str, str]:
    """This one's, with the checkout on the path and nothing of INFERMESH_* that a developer's shell may hold."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("INFERMESH_")}
    return {**kept, "PYTHONPATH": str(root), **more}


def ask(*words: str, timeout_s: float = 60.0, code: int = 0) -> str:
    """Runs a verb to its end and returns what it prints on standard output."""
    done = subprocess.run(
        infermesh(*words), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Child:
    """One of them. `name` is that of its log and its ready file; `root` the checkout that it runs."""

    def __init__(
        self, folder: Path, name: str, words: Sequence[str], *, root: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._asked = False
        self.log = folder / f"{name}.log"
        self._ready = folder / f"{name}.ready.json"
        self._ready.unlink(missing_ok=True)
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(
                [*words, "--ready-file", str(self._ready)],
                cwd=root,
                env=environment(root, **(env or {})),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    @property
    def serves(self) -> bool:
        """Whether it has told that it serves. Raises RuntimeError where it has ended instead."""
        if self._ready.exists():
            return True
        if self.ended:
            raise RuntimeError(f"{self.name} ended with {self.popen.returncode}\n{self.text()[-4000:]}")
        return False

    def told(self, timeout_s: float = START_S) -> dict[str, Any]:
        """What it tells when it serves; blocks until then."""
        deadline = time.monotonic() + timeout_s
        while not self.serves:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not serve after {timeout_s} s\n{self.text()[-4000:]}")
            time.sleep(0.02)
        found: dict[str, Any] = json.loads(self._ready.read_text())
        return found

    @property
    def address(self) -> str:
        return str(self.told()["address"])

    def text(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def freeze(self) -> None:
        """SIGSTOP: its connections stay, and nobody answers."""
        self.popen.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the process itself, as an out-of-memory killer does; what it started is left to `end`."""
        self.popen.kill()
        self.popen.wait()

    def destroy(self) -> None:
        """Leaves nothing of it behind, whatever it was doing."""
        self.popen.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()

    def ask(self) -> None:
        """SIGTERM, once: a second one would mean "at once"."""
        if not self._asked and not self.ended:
            self._asked = True
            self.popen.terminate()

    def end(self) -> None:
        """Asks it to leave; nothing of it stays.

        Raises:
            AssertionError: it lived, and did not leave well on SIGTERM.
        """
        fault = ""
        if not self.ended or self._asked:
            self.ask()
            try:
                code = self.popen.wait(LEAVE_S)
                fault = f"ended with {code}" if code else ""
            except subprocess.TimeoutExpired:
                fault = f"did not leave within {LEAVE_S} s"
        self.destroy()
        assert not fault, f"{self.name} {fault}\n{self.text()[-4000:]}"


class Children:
    """All children of a test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._all: dict[str, Child] = {}

    def __enter__(self) -> Children:
        return self

    def start(self, verb: str, *flags: str, name: str = "", python: str = sys.executable) -> Child:
        """Starts one and does not wait for it. A name may be used again once its bearer has ended."""
        return self.run(name or verb, infermesh(verb, *flags, python=python))

    def run(self, name: str, words: Sequence[str], **how: Any) -> Child:
        """The same for any command line that takes `--ready-file`; `how` as `Child` takes it."""
        if name in self._all:
            self._all[name].end()
        child = self._all[name] = Child(self._folder, name, words, **how)
        return child

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faults = []
        for child in list(self._all.values())[1:]:
            child.ask()
        for child in reversed(self._all.values()):  # a registry, started first, is left last
            try:
                child.end()
            except AssertionError as fault:
                faults.append(str(fault))
        if error is None:
            assert not faults, "\n".join(faults)
