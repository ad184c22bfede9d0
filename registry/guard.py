"""How far a registry's word is believed when entries vanish. Pure: time is an argument.

A registry that restarted empty, lost its token or was cut off from the instances says "gone" of instances that serve
happily. So a vanishing is believed at once only while it is small (at most half of what was known within the grace
time); a bigger one is shown as it last was until the registry has said the same for the whole grace time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Set

from registry.port import Entry


class VanishGuard:
    """What to show, given what the registry says. One for each set of entries that can vanish together."""

    def __init__(self, *, grace_s: float = 10.0, share: float = 0.5) -> None:
        self._grace_s = grace_s
        self._share = share
        self._shown: dict[str, Entry] = {}
        self._held: dict[str, float | None] = {}  # id -> doubted since [s]; None = the clock stands, registry away
        self._dropped: deque[float] = deque()  # when entries were dropped on the registry's word alone

    @property
    def holding(self) -> bool:
        """Whether something is shown that the registry does not list (any more, or yet)."""
        return bool(self._held)

    def update(
        self, seen: Mapping[str, Entry], now: float, *, sure: Set[str] = frozenset(), reborn: bool = False
    ) -> dict[str, Entry]:
        """What to show from now on.

        Args:
            seen: what the registry lists, by id.
            now: monotonic seconds.
            sure: ids whose vanishing has a second witness (they said goodbye, their check was critical before).
            reborn: the registry has just started or come back; what is missing may only not be back yet.
        """
        while self._dropped and now - self._dropped[0] >= self._grace_s:
            self._dropped.popleft()
        missing = [id for id in self._shown if id not in seen and id not in sure]
        known = len(missing) + sum(id in seen for id in self._shown) + len(self._dropped)
        believe = not reborn and len(missing) + len(self._dropped) <= self._share * known
        shown, held = dict(seen), dict[str, float | None]()
        for id in missing:
            since = self._held.get(id, now)
            if id not in self._held and believe:
                self._dropped.append(now)
            elif since is None or now - since < self._grace_s:
                shown[id] = self._shown[id]
                held[id] = now if since is None else since
        self._shown, self._held = shown, held
        return dict(shown)

    def pause(self) -> None:
        """The registry is out of reach: silence is not its word, so the grace time starts anew when it is back."""
        self._held = dict.fromkeys(self._held)


class Seniority:
    """Which life of an id began last, as far as one observer can tell: the one that it met last for the first time.

    Incarnations are random, so they carry no order; wall clocks of two hosts give none either.
    """

    def __init__(self, limit: int = 16384) -> None:
        self._met: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._next = 0
        self._limit = limit

    def rank(self, id: str, incarnation: int) -> int:
        """Bigger = began later. Meeting an incarnation for the first time makes it the youngest."""
        key = (id, incarnation)
        if key not in self._met:
            self._next += 1
            self._met[key] = self._next
            if len(self._met) > self._limit:
                self._met.popitem(last=False)
        self._met.move_to_end(key)
        return self._met[key]
