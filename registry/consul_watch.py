"""Knowing others through Consul: one blocking query a kind, and what is made of the answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Final

from tenacity import RetryCallState

from registry.consul_wire import Answer, Away, Calls, Refused, next_index, read_listing, service_name
from registry.endpoint import KINDS, Rejected
from registry.guard import VanishGuard
from registry.patience import patiently
from registry.port import Entry, Snapshot

log = logging.getLogger("infermesh.registry.consul")

FIRST_ANSWER_S: Final = 2.0  # how long a watcher waits for its first answer before it says "stale and empty"


class KindView:
    """One kind's last known set. Pure. `known`: something may be said of it; `stale`: Consul is away or leaderless."""

    def __init__(self, kind: str, registry_host: str, grace_s: float) -> None:
        self.kind = kind
        self.index = 0
        self.known = False
        self.stale = False
        self.entries: tuple[Entry, ...] = ()
        self.rejected: tuple[Rejected, ...] = ()
        self._registry_host = registry_host
        self._guard = VanishGuard(grace_s=grace_s)
        self._critical: frozenset[str] = frozenset()
        self._broken = False
        self._back = False

    @property
    def young(self) -> bool:
        """Consul has lost more than it is believed to, and may be filling again."""
        return self._guard.holding

    def heard(self, answer: Answer, now: float) -> bool:
        """Takes an answer in; true if Consul had been away."""
        following = next_index(self.index, answer.index)
        # Without a leader, or after a restart, what is missing may only not be back yet.
        reborn = self._broken or not answer.leader or (self.index > 0 and following == 0)
        self.index = following
        if not answer.leader:
            self._guard.pause()
        listing = read_listing(self.kind, answer.items, self._registry_host)
        # A critical check is a second witness for a vanishing, unless the whole directory began anew.
        sure = frozenset[str]() if reborn else self._critical
        shown = self._guard.update(listing.entries, now, sure=sure, reborn=reborn)
        self._critical = frozenset(id for id, entry in listing.entries.items() if not entry.passing)
        self.entries = tuple(shown[id] for id in sorted(shown))
        self.rejected = listing.rejected
        was_away = self._back and answer.leader
        self.known, self.stale, self._broken, self._back = True, not answer.leader, False, False
        return was_away

    def broken(self) -> None:
        """A query failed: whoever answers next may be another server, or the same one after a restart."""
        self._broken = True
        self.index = 0

    def lost(self) -> bool:
        """Consul does not answer any more; true if that is news."""
        news = not self._back
        self.known, self.stale, self._back = True, True, True
        self.broken()
        self._guard.pause()
        return news


class Pace:
    """At most `burst` queries at once and `rate` a second from then on: a flapping service makes no storm. Pure."""

    def __init__(self, *, rate: float = 3.0, burst: float = 4.0) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = 0.0

    def delay(self, now: float) -> float:
        """Seconds to wait before the next query, which is thereby taken."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - 1.0
        self._at = now
        return max(0.0, -self._tokens / self._rate)


class Watcher:
    """All watches of this process."""

    def __init__(self, calls: Calls, prefix: str, consul_host: str, wait_s: float, grace_s: float) -> None:
        self._calls = calls
        self._prefix = prefix
        self._consul_host = consul_host
        self._wait_s = wait_s
        self._grace_s = grace_s
        self._signals: set[asyncio.Event] = set()
        self._closed = False

    async def watch(self, kinds: tuple[str, ...]) -> AsyncIterator[Snapshot]:
        changed = asyncio.Event()
        views = [KindView(kind, self._consul_host, self._grace_s) for kind in kinds or KINDS]
        tasks = [asyncio.create_task(self._follow(view, changed), name=f"consul-watch-{view.kind}") for view in views]
        self._signals.add(changed)

        def out_of_patience() -> None:
            for view in views:
                if not view.known:
                    view.lost()
            changed.set()

        timer = asyncio.get_running_loop().call_later(FIRST_ANSWER_S, out_of_patience)
        last: Snapshot | None = None
        try:
            while not self._closed:
                await changed.wait()
                changed.clear()
                if self._closed or not all(view.known for view in views):
                    continue
                snapshot = Snapshot(
                    entries=tuple(sorted((e for v in views for e in v.entries), key=lambda e: e.endpoint.id)),
                    rejected=tuple(sorted((r for v in views for r in v.rejected), key=lambda r: r.id)),
                    stale=any(view.stale for view in views),
                    young=any(view.young for view in views),
                )
                if snapshot != last:
                    last = snapshot
                    yield snapshot
        finally:
            timer.cancel()
            self._signals.discard(changed)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Ends every watch."""
        self._closed = True
        for changed in self._signals:
            changed.set()

    async def _follow(self, view: KindView, changed: asyncio.Event) -> None:
        clock = asyncio.get_running_loop().time
        pace = Pace()

        def failed(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            view.broken()
            # One failure is no news: a blocking query ends in an error whenever Consul changes its leader.
            if state.attempt_number > 1 and view.lost():
                log.warning("Consul is out of reach (%s); the last known set of %s stays", error, view.kind)
            changed.set()

        while not self._closed:
            await asyncio.sleep(pace.delay(clock()))
            try:
                answer: Answer = await patiently((Away, Refused), failed)(self._ask, view)
                if view.heard(answer, clock()):
                    log.info("Consul answers again; watching %s", view.kind)
            except Exception:
                log.exception("reading Consul's %s failed; it goes on", view.kind)
                view.lost()
                await asyncio.sleep(1.0)
            changed.set()

    async def _ask(self, view: KindView) -> Answer:
        # While Consul is doubted (leaderless, or something is held against its word), look each second: both must end
        # on time, and neither changes the index.
        wait_s = min(1.0, self._wait_s) if view.young or view.stale else self._wait_s
        answer = await self._calls.listing(service_name(self._prefix, view.kind), view.index, wait_s)
        if answer.filtered and not answer.items:
            raise Refused("the token may not read the mesh's services; it needs service_prefix and node_prefix read")
        return answer
