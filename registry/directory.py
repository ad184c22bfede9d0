"""The embedded registry's state. Pure: time is an argument, streams are numbers ("sessions").

A line lives as long as its session. Goodbye = gone now. A broken or silent session = suspect for 3 s, in which the same
life may come back on another stream. Of two lives of one id the one that began last wins; the older stays refused.
What a line means (can it be dialled, is its metadata readable?) is judged by those who read it; here only size counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from registry.endpoint import MAX_PAIRS, MAX_VALUE_BYTES
from registry.guard import Seniority

_ID: Final = re.compile(r"[!-~]{1,128}")
_SERVICE: Final = re.compile(r"[A-Za-z0-9-]{1,128}")
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class Line:
    """One registration."""

    service: str
    id: str
    host: str
    port: int
    metadata: Mapping[str, str]

    @property
    def incarnation(self) -> int:
        try:
            return int(self.metadata.get("incarnation", "0"), 16)
        except ValueError:
            return 0

    @property
    def size(self) -> int:
        """Bytes, about."""
        pairs = sum(len(key) + len(value.encode()) for key, value in self.metadata.items())
        return len(self.service) + len(self.id) + len(self.host.encode()) + pairs


@dataclass(frozen=True, slots=True)
class Listed:
    line: Line
    suspect: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """`refused`: why the line was not taken (empty = taken). `superseded`: the session that lost its line by this."""

    refused: str = ""
    superseded: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and times [s]. `silence_s` is for sessions that send nothing: they renew every second."""

    entries: int = 4096
    total_bytes: int = 16 << 20
    suspect_s: float = 3.0
    silence_s: float = 2.5


@dataclass(slots=True)
class _Slot:
    line: Line
    session: int
    heard: float
    suspect_since: float | None = None


class Directory:
    """Everything that is registered. `revision` rises with every change that a watcher would see."""

    def __init__(self, now: float, limits: Limits = Limits()) -> None:
        self.revision = 1
        self._limits = limits
        self._began = now
        self._ticked = now
        self._slots: dict[str, _Slot] = {}
        self._sessions: dict[int, Line] = {}
        self._bytes = 0
        self._seniority = Seniority(4 * limits.entries)

    def age_s(self, now: float) -> float:
        return max(0.0, now - self._began)

    def listed(self, services: tuple[str, ...] = ()) -> tuple[Listed, ...]:
        return tuple(
            Listed(slot.line, slot.suspect_since is not None)
            for _, slot in sorted(self._slots.items())
            if not services or slot.line.service in services
        )

    def join(self, session: int, line: Line, now: float) -> Joined:
        """Takes a new or changed line of a session."""
        if fault := self._unfit(session, line):
            return Joined(refused=fault)
        slot = self._slots.get(line.id)
        rank = self._seniority.rank(line.id, line.incarnation)
        if slot and self._seniority.rank(line.id, slot.line.incarnation) > rank:
            return Joined(refused=superseded_text(line.id, slot.line.incarnation))
        old = slot.line if slot else None
        self._bytes += line.size - (old.size if old else 0)
        self._sessions[session] = line
        self._slots[line.id] = _Slot(line, session, now)
        if old != line or (slot and slot.suspect_since is not None):
            self.revision += 1
        lost = slot.session if slot and slot.session != session else None
        if lost is not None:
            self._sessions.pop(lost, None)
        # The same life on a new stream has only been reconnected; nobody needs to be told.
        told = lost if old and old.incarnation != line.incarnation else None
        return Joined(superseded=told)

    def renew(self, session: int, now: float) -> None:
        """The session is alive. Its line comes back if silence had removed it."""
        line = self._sessions.get(session)
        if line is None:
            return
        slot = self._slots.get(line.id)
        if slot is None or slot.session != session:
            self.join(session, line, now)
            return
        slot.heard = now
        if slot.suspect_since is not None:
            slot.suspect_since = None
            self.revision += 1

    def leave(self, session: int) -> None:
        """Goodbye."""
        line = self._sessions.pop(session, None)
        if line and (slot := self._slots.get(line.id)) and slot.session == session:
            self._remove(line.id)

    def lose(self, session: int, now: float) -> None:
        """The session's stream broke. No effect if its line has moved to another session."""
        line = self._sessions.pop(session, None)
        if line and (slot := self._slots.get(line.id)) and slot.session == session:
            self._suspect(slot, now)

    def tick(self, now: float) -> None:
        """Lets silence take effect; to be called about every 0.25 s. Time during which we ourselves slept is nobody's
        silence: after a late tick all are heard anew."""
        slept = now - self._ticked - 1.0
        self._ticked = now
        for id, slot in list(self._slots.items()):
            if slept > 0:
                slot.heard += slept
                slot.suspect_since = None if slot.suspect_since is None else slot.suspect_since + slept
            if slot.suspect_since is None:
                if now - slot.heard > self._limits.silence_s:
                    self._suspect(slot, now)
            elif now - slot.suspect_since >= self._limits.suspect_s:
                self._remove(id)

    def _suspect(self, slot: _Slot, now: float) -> None:
        if slot.suspect_since is None:
            slot.suspect_since = now
            self.revision += 1

    def _remove(self, id: str) -> None:
        self._bytes -= self._slots.pop(id).line.size
        self.revision += 1

    def _unfit(self, session: int, line: Line) -> str:
        """Why a line is not taken; empty if it is."""
        held = self._sessions.get(session)
        if held and held.id != line.id:
            return f"one stream is one instance: this one is {held.id}"
        if not _ID.fullmatch(line.id):
            return "the id must be 1 to 128 printable ASCII characters without blanks"
        if not _SERVICE.fullmatch(line.service):
            return "the service must be 1 to 128 letters, digits and dashes"
        if len(line.host) > 253:
            return "the host is longer than 253 characters"
        if len(line.metadata) > MAX_PAIRS:
            return f"{len(line.metadata)} metadata pairs, at most {MAX_PAIRS} are taken"
        for key, value in line.metadata.items():
            if not _KEY.fullmatch(key):
                return f"metadata key {key[:128]!r} is not [A-Za-z0-9_-]{{1,128}}"
            if len(value.encode()) > MAX_VALUE_BYTES:
                return f"metadata {key}: {len(value.encode())} bytes, at most {MAX_VALUE_BYTES} are taken"
        known = self._slots.get(line.id)
        if known is None and len(self._slots) >= self._limits.entries:
            return f"the registry is full ({self._limits.entries} instances)"
        if self._bytes + line.size - (known.line.size if known else 0) > self._limits.total_bytes:
            return f"the registry is full ({self._limits.total_bytes} bytes)"
        return ""


def superseded_text(id: str, incarnation: int) -> str:
    return f"superseded: {id} has been registered by a later process ({incarnation:016x}); give each its own --id"
