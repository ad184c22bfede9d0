"""What a client of embedded registries knows, from several of them at once. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from registry.consul_wire import foreign_loopback
from registry.directory import Listed
from registry.endpoint import KINDS, Endpoint, Rejected, from_metadata
from registry.guard import Seniority, VanishGuard
from registry.port import Entry, Snapshot

YOUNG_S: Final = 3.0


class HostView:
    """What one registry says. `live`: its stream is up."""

    def __init__(self, host: str, prefix: str) -> None:
        self.known = False
        self.live = False
        self.began = 0.0  # when that registry started, on our clock
        self.entries: dict[str, Entry] = {}
        self.rejected: dict[str, Rejected] = {}
        self._host = host
        self._prefix = prefix

    def heard(self, listed: Iterable[Listed], began: float) -> tuple[frozenset[str], bool]:
        """Takes the whole directory in. Returns the ids that said goodbye (they vanished within one unbroken stream
        without having been suspect) and whether this is the first word of a new stream."""
        fresh = not self.live
        before = self.entries
        self.entries, self.rejected = {}, {}
        for item in listed:
            read = self._read(item)
            if isinstance(read, Rejected):
                self.rejected[read.id] = read
            else:
                self.entries[read.id] = Entry(read, not item.suspect)
        self.known = self.live = True
        self.began = began
        left = frozenset[str]()
        if not fresh:
            left = frozenset(id for id, entry in before.items() if entry.passing and id not in self.entries)
        return left, fresh

    def lost(self) -> None:
        self.known, self.live = True, False

    def _read(self, item: Listed) -> Endpoint | Rejected:
        line = item.line
        kind = line.service.removeprefix(f"{self._prefix}-")
        if kind not in KINDS:
            return Rejected(line.id, kind, f"{line.host}:{line.port}", f"service {line.service!r} is not of this mesh")
        read = from_metadata(line.id, kind, line.host, line.port, line.metadata)
        if isinstance(read, Endpoint) and (fault := foreign_loopback(read.host, self._host)):
            return Rejected(read.id, kind, read.address, fault)
        return read


class MergedView:
    """All registries together: instances register at each, so one that is up is enough."""

    def __init__(self, grace_s: float) -> None:
        self._guard = VanishGuard(grace_s=grace_s)
        self._seniority = Seniority()
        self._left: set[str] = set()
        self._reborn = False
        self.views: list[HostView] = []

    @property
    def known(self) -> bool:
        return all(view.known for view in self.views)

    @property
    def holding(self) -> bool:
        return self._guard.holding

    def heard(self, view: HostView, listed: Iterable[Listed], age_s: float, now: float) -> None:
        left, fresh = view.heard(listed, now - age_s)
        self._left |= left
        self._reborn = self._reborn or fresh

    def lost(self, view: HostView) -> None:
        """A registry's stream broke: what only that one listed is doubted, not gone."""
        view.lost()
        self._reborn = True

    def snapshot(self, now: float) -> Snapshot:
        """What to show now."""
        live = [view for view in self.views if view.live]
        best: dict[str, tuple[tuple[bool, int], Entry]] = {}
        for view in live:
            for id, entry in view.entries.items():
                rank = (entry.passing, self._seniority.rank(id, entry.endpoint.incarnation))
                if id not in best or best[id][0] < rank:
                    best[id] = (rank, entry)
        seen = {id: entry for id, (_, entry) in best.items()}
        if not live:
            self._guard.pause()
        shown = self._guard.update(seen, now, sure=self._left - seen.keys(), reborn=self._reborn or not live)
        if live:
            self._left, self._reborn = set(), False
        rejected = {id: line for view in live for id, line in view.rejected.items()}
        return Snapshot(
            entries=tuple(shown[id] for id in sorted(shown)),
            rejected=tuple(rejected[id] for id in sorted(rejected)),
            stale=not live,
            young=bool(live) and (all(now - view.began < YOUNG_S for view in live) or self.holding),
        )
