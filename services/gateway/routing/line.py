"""Who waits in this gateway for one instance, in the order in which it would take them.

A place in a line is not a binding: when the instance can take somebody, or another one stands idle, the choice is made
again with what is known then. Class first. Within a tenant: its priority; then those whose first token can still come
within the target (under overload, age alone would make everybody late); then a key that never changes while a request
waits (its work here plus its age at a discount: short work first). Between tenants neither priority nor age counts, but
who was given less, or a flood would go before everybody who comes later. Every fourth place is for those overdue,
whoever they are.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import frexp

from services.chassis.fairness import FAIRNESS, LATE_S
from services.chassis.granting import AGING, SIZES
from services.gateway.routing.facts import Facts

HASTE = 1.0  # a second that the cache saves now, and might not later, outweighs so many seconds of work
OVERDUE = 0.5  # of the longest wait: from then on a request has a share in every fourth place
TURN = 4
LATE = 1e9  # more than any work: who cannot be on time goes after those who can
_CLASS_RANK = {"core": 0, "standard": 1, "bulk": 2}
Key = tuple[int, int, float, int]
Between = tuple[int, bool, float, int]


def rank_of(facts: Facts) -> int:
    """Who goes first: whose answer goes on, for somebody is reading along; then its class."""
    return -1 if facts.alike is not None else _class_rank(facts)


def _class_rank(facts: Facts) -> int:
    return _CLASS_RANK.get(facts.klass, 1)


@dataclass(slots=True, eq=False)
class Waiting:
    """One waiting request. `until`: when it is given up, whatever comes first of deadline, age and grace. `held`: the
    part of its prompt by instance, as last known. `work`: seconds of its prompt where it stands; `home`: the instance's
    id, empty where nobody could take it yet. `late`: its first token cannot come within the target any more."""

    ticket: int
    facts: Facts
    tokens: int
    until: float
    draw: float
    held: dict[str, float]
    home: str = ""
    work: float = 0.0
    saved: float = 0.0
    key: Key = (0, 0, 0.0, 0)
    late: bool = False
    overdue: bool = False
    degraded_from: str = ""
    looked: int = 0  # times it was asked whether the fallback would serve it sooner
    long: bool = False  # only the long-context tier could take it
    lacked: int | None = None  # the first block of its prompt that was not at home when it was placed there

    def order(self, work: float, saved: float) -> Key:
        facts = self.facts
        key = work - HASTE * saved + AGING * facts.since + (LATE if self.late else 0.0)
        return (_class_rank(facts), -facts.priority, key, self.ticket)

    def between(self, ahead: float, beyond: bool) -> Between:
        """Where it stands among other tenants' requests. `ahead`: seconds that its tenant was given beyond the least;
        `beyond`: it has more of the instance than others."""
        score = self.work - HASTE * self.saved + FAIRNESS * ahead + (LATE_S if self.late else 0.0)
        return rank_of(self.facts), beyond, score, self.ticket

    def lacks(self) -> int | None:
        """The first block of its prompt that is not at home."""
        facts = self.facts
        if not facts.chain_share:
            return None
        found = round(self.held.get(self.home, 0.0) / facts.chain_share)
        return facts.chain[found] if found < len(facts.chain) else None

    def yields_after(self) -> tuple[int, int, int]:
        """Who goes to a fallback first: the least looked at, then the least of the core, then the newest."""
        return self.looked, -_class_rank(self.facts), -self.ticket


@dataclass(slots=True)
class Line:
    """`seconds`: work of all that stand here; `sizes`: of those who are not late, by power of two, and `late_sizes`: of
    those who are, `late` in number; `overdue`: those who are, by ticket, in the order in which that was seen.
    `others_*`: those who wait for the same instance in other gateways, by its word."""

    tenants: dict[str, list[tuple[Key, Waiting]]] = field(default_factory=dict)
    seconds: float = 0.0
    count: int = 0
    late: int = 0
    sizes: list[float] = field(default_factory=lambda: [0.0] * SIZES)
    late_sizes: list[float] = field(default_factory=lambda: [0.0] * SIZES)
    overdue: dict[int, Waiting] = field(default_factory=dict)
    others_s: float = 0.0
    others_count: int = 0
    others_sizes: list[float] = field(default_factory=list)

    def add(self, waiting: Waiting, home: str, work: float, saved: float) -> None:
        waiting.home, waiting.work, waiting.saved, waiting.key = home, work, saved, waiting.order(work, saved)
        insort(self.tenants.setdefault(waiting.facts.tenant, []), (waiting.key, waiting), key=_key)
        self.count += 1
        self.seconds += work
        self.late += waiting.late
        (self.late_sizes if waiting.late else self.sizes)[_size(work)] += work
        if waiting.overdue:
            self.overdue[waiting.ticket] = waiting

    def remove(self, waiting: Waiting) -> None:
        entries = self.tenants[waiting.facts.tenant]
        del entries[bisect_left(entries, waiting.key, key=_key)]
        if not entries:
            del self.tenants[waiting.facts.tenant]
        self.overdue.pop(waiting.ticket, None)
        waiting.home = ""
        self.count -= 1
        self.late -= waiting.late
        if self.count:
            self.seconds -= waiting.work
            (self.late_sizes if waiting.late else self.sizes)[_size(waiting.work)] -= waiting.work
        else:  # no dust of rounding
            self.seconds, self.sizes, self.late_sizes = 0.0, [0.0] * SIZES, [0.0] * SIZES

    def hear(self, line_ms: Sequence[int], waiting: int) -> None:
        """What the instance says of other gateways' lines."""
        self.others_sizes = [ms / 1000 for ms in line_ms]
        self.others_s, self.others_count = sum(self.others_sizes), waiting

    def line_ms(self) -> tuple[int, ...]:
        """Work of all that stand here by size, late ones last, without the empty sizes at the end."""
        sizes = [round(seconds * 1000) for seconds in (*self.sizes, sum(self.late_sizes))]
        while sizes and not sizes[-1]:
            sizes.pop()
        return tuple(sizes)

    @property
    def all_s(self) -> float:
        return self.seconds + self.others_s

    @property
    def all_count(self) -> int:
        return self.count + self.others_count

    def ahead_s(self, work: float) -> float:
        """Seconds of those who would be taken before somebody with so much work."""
        end = _size(work) + 1  # equals go by age
        own = sum(self.sizes[:end]) if self.count else 0.0
        return own + sum(self.others_sizes[:end]) if self.others_count else own

    def late_s(self, work: float) -> float:
        """Seconds of those no larger who are late already: they would go before it, if age alone counted."""
        return sum(self.late_sizes[: _size(work) + 1]) if self.count else 0.0

    def first(
        self, ahead: Mapping[str, float], turn: int, beyond: Container[str] = (), but: Container[str] = ()
    ) -> Waiting | None:
        """Whom the instance would take now. `ahead`: seconds that each tenant was given beyond the least. `turn`: how
        many requests it has taken. `beyond`: tenants that have more of it than others. `but`: not one of these."""
        if self.overdue and turn % TURN == 0 and not but:
            return next(iter(self.overdue.values()))
        heads = (entries[0][1] for tenant, entries in self.tenants.items() if tenant not in but)
        if len(self.tenants) == 1:
            return next(heads, None)

        def between(head: Waiting) -> Between:
            tenant = head.facts.tenant
            return head.between(ahead.get(tenant, 0.0), tenant in beyond)

        return min(heads, key=between, default=None)

    def last(self, count: int) -> Iterator[Waiting]:
        """Some of those who would wait longest."""
        for entries in self.tenants.values():
            for _, waiting in entries[-count:]:
                yield waiting

    def all(self) -> list[Waiting]:
        return [waiting for entries in self.tenants.values() for _, waiting in entries]


def _key(entry: tuple[Key, Waiting]) -> Key:
    return entry[0]


def _size(work: float) -> int:
    return min(SIZES - 1, max(0, frexp(work)[1] + 8)) if work > 0 else 0
