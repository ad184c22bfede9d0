"""What runs on a Ray node: one service's process and whatever it starts, in a session of its own. An actor is made of
`Service`; Ray itself is not needed here.

The actor is never restarted by Ray (max_restarts=0): when its node or it dies, `up` places the instance anew. A guard
outlives the actor and ends what it left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.launch import sessions
from deploy.launch.host import llm_python

PYTHON, LLM_PYTHON = "{python}", "{llm_python}"  # the node's own interpreters
FOLDER, ADDRESS = "{folder}", "{address}"  # a private folder there, and the node's IP address
READ_BYTES = 256 << 10  # of the log at a time
GUARD_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Launch:
    """`argv`, `env` and the names of `files` may hold the placeholders above. `only_given_gpus`: the service sees those
    that Ray gave to the actor; False where vLLM takes its cards from Ray itself.
    """

    id: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, bytes] = field(default_factory=dict)
    only_given_gpus: bool = True
    keep_threads: bool = False  # OMP_NUM_THREADS, which Ray sets to the CPUs reserved


@dataclass(frozen=True, slots=True)
class Seen:
    """A look at it. `code` is None while it runs; `facts`: what it told when it became ready."""

    pid: int
    code: int | None
    facts: Mapping[str, str]
    log: bytes


class Service:
    """One life of one instance."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._folder = Path(tempfile.mkdtemp(prefix="infermesh-"))
        self._guard = _alone(self._folder)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, launch: Launch) -> int:
        """Writes its files, starts it, returns its process id.

        Raises:
            OSError: it cannot be started.
        """
        words = self._placeholders(launch)

        def put(text: str) -> str:
            for name, value in words.items():
                text = text.replace(name, value)
            return text

        for name, content in launch.files.items():
            path = Path(put(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)
            path.write_bytes(content)
        env = inherited(os.environ, launch) | {name: put(value) for name, value in launch.env.items()}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [put(word) for word in launch.argv],
                cwd=self._folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"+{self._process.pid}\n".encode())
        self._guard.stdin.flush()
        return self._process.pid

    def look(self, offset: int) -> Seen:
        """How it is, and its log from this byte on, a part of it where that is long."""
        assert self._process is not None
        code = self._process.poll()
        with (self._folder / "log").open("rb") as handle:
            handle.seek(offset)
            log = handle.read(READ_BYTES)
        return Seen(self._process.pid, code, self._facts(), log)

    def terminate(self) -> None:
        """SIGTERM: it leaves the registry, finishes what it is running, and ends."""
        if self._process is not None:
            sessions.terminate(self._process.pid)

    def end(self) -> list[int]:
        """Kills what is left of it and removes its folder. Returns who would not die."""
        assert self._guard.stdin is not None
        left = sessions.sweep(self._process.pid) if self._process else []
        if self._process:
            self._process.wait()
            self._guard.stdin.write(f"-{self._process.pid}\n".encode())
        self._guard.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return left

    def _facts(self) -> dict[str, str]:
        try:
            told = json.loads((self._folder / "ready.json").read_text())
        except (OSError, ValueError):
            return {}
        return {key: str(value) for key, value in told.items()}

    def _placeholders(self, launch: Launch) -> dict[str, str]:
        words = {FOLDER: str(self._folder), ADDRESS: self._address, PYTHON: sys.executable}
        if LLM_PYTHON in launch.argv:
            if not (found := llm_python()):
                raise FileNotFoundError(
                    f"vLLM is not installed on node {self._address} (looked in {sys.prefix} and {Path.cwd()}): install "
                    "infermesh[llm] where Ray runs, or name an interpreter of that node with `python:`"
                )
            words[LLM_PYTHON] = found
        return words


def inherited(environ: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """The node's variables without ours and without those that Ray made for its own worker."""
    dropped = ("INFERMESH_", "RAY_")
    env = {name: value for name, value in environ.items() if not name.startswith(dropped)}
    if not launch.only_given_gpus:
        env.pop("CUDA_VISIBLE_DEVICES", None)
    if not launch.keep_threads:
        env.pop("OMP_NUM_THREADS", None)
    return env


def _alone(folder: Path) -> subprocess.Popen[bytes]:
    """A guard that is nobody's child: a dying Ray worker kills its own. It has no signal handler of the actor's."""
    guard = Path(sessions.__file__).with_name("guard.py")
    made = subprocess.Popen(
        [sys.executable, "-I", "-S", str(guard), str(GUARD_GRACE_S), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        made.wait(10)
    return made


def code_of(code: int) -> int:
    """A child's end as the exit code of who stands for it."""
    return 128 + signal.Signals(-code).value if code < 0 else code
