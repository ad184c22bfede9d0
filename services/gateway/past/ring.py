"""Lines kept in files of bounded size: what is new goes at the end, the oldest file goes when there are too many bytes.

Whole lines are written in one step, and a start begins a new file: a line that a crash cut short damages no other.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PARTS = 8  # files that the room is divided into
FILES = 64  # as many at most, however often the process starts
CHUNK = 1 << 18  # bytes read at a time: a search must not hold the interpreter's lock for milliseconds


class Ring:
    """One writer a folder; the lock file says who. Blocks: to be used outside of an event loop."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Raises OSError: the folder cannot be made, written, or is another process's."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._limit = limit
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._last = max((int(path.stem) for path in self._files()), default=0)
            self._file = -1
            self._size = 0
            self._torn = False  # the last line may be cut short: a full disk
            self._next()
        except OSError:
            os.close(self._lock)
            raise

    def append(self, lines: Sequence[bytes]) -> None:
        """Lines without their line ends. Raises OSError; then some of them may be there."""
        room = max(1, self._limit // PARTS)
        block: list[bytes] = []
        for line in lines:
            if len(line) >= room:
                continue
            if self._size + len(line) >= room:
                self._write(block)
                block = []
                self._next()
            block.append(line)
            self._size += len(line) + 1
        self._write(block)

    def find(self, beginning: bytes, take: Callable[[bytes], bool]) -> bytes | None:
        """The newest whole line that begins so and that `take` wants."""
        for path in sorted(self._files(), reverse=True):
            found = None
            for line in _lines_with(path, beginning):
                if take(line):
                    found = line
            if found is not None:
                return found
        return None

    def since(self) -> float | None:
        """Unix time of the oldest file that is kept; None while there is nothing."""
        for path in sorted(self._files()):
            status = path.stat()
            if status.st_size:
                return status.st_mtime
        return None

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)

    def _write(self, block: Sequence[bytes]) -> None:
        if not block:
            return
        text = (b"\n" if self._torn else b"") + b"\n".join(block) + b"\n"
        self._torn = True
        if os.write(self._file, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    def _next(self) -> None:
        """Begins a file, and lets the oldest go until a whole further one has room."""
        if self._file >= 0:
            os.close(self._file)
        self._last += 1
        self._size = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path(self._last), flags, 0o600)
        files = sorted(self._files())
        sizes = [path.stat().st_size for path in files]
        while len(files) > 1 and (sum(sizes) > self._limit - self._limit // PARTS or len(files) > FILES):
            files.pop(0).unlink()
            sizes.pop(0)

    def _files(self) -> list[Path]:
        return [path for path in self._folder.glob("*.jsonl") if path.stem.isdigit()]

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:010}.jsonl"


def _lines_with(path: Path, beginning: bytes) -> Iterator[bytes]:
    """The whole lines of a file that begin so. What cannot be read is as if it were not there."""
    rest = b""
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                block = rest + chunk
                whole = block.rfind(b"\n") + 1
                if beginning in block[:whole]:
                    yield from (line for line in block[:whole].split(b"\n") if line.startswith(beginning))
                rest = block[whole:] if len(block) - whole < 64 * CHUNK else b""
    except OSError:
        return
