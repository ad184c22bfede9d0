"""The bounded wait for room: one lane for each model, so that a full one delays nobody else.

A lane is bounded in requests, tokens and age. Order: class, then priority, then age; tenants will be made fair in
`Waiting.key`, which is the only place that knows an order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import islice

from services.gateway.routing.facts import Facts

_CLASS_RANK = {"core": 0, "standard": 1, "bulk": 2}
Lane = tuple[str, str]  # kind, model as asked for


@dataclass(frozen=True, slots=True)
class Bounds:
    """`max_tokens`: estimated prompt + answer of a lane's requests."""

    max_requests: int = 1024
    max_tokens: int = 8 << 20
    max_wait_s: float = 30.0


@dataclass(slots=True)
class Waiting:
    """`until`: when it is given up, whatever comes first of deadline, age and grace."""

    ticket: int
    facts: Facts
    tokens: int
    until: float
    draw: float
    key: tuple[int, int, float, int] = field(init=False)

    def __post_init__(self) -> None:
        facts = self.facts
        self.key = (_CLASS_RANK.get(facts.klass, 1), -facts.priority, facts.since, self.ticket)


@dataclass(slots=True)
class Queue:
    bounds: Bounds
    lanes: dict[Lane, list[Waiting]] = field(default_factory=dict)
    tokens: dict[Lane, int] = field(default_factory=dict)
    tickets: dict[int, Waiting] = field(default_factory=dict)
    behind: dict[Lane, int] = field(default_factory=dict)  # where `look_at` goes on

    def full(self, lane: Lane, tokens: int) -> str:
        """Which bound the next request would break; empty if none. A lane that is empty takes any one request."""
        waiting = self.lanes.get(lane)
        if len(waiting or ()) >= self.bounds.max_requests:
            return f"{self.bounds.max_requests} requests wait already"
        if waiting and self.tokens[lane] + tokens > self.bounds.max_tokens:
            return f"{self.tokens[lane]} tokens of work wait already"
        return ""

    def add(self, waiting: Waiting) -> None:
        lane = (waiting.facts.kind, waiting.facts.model)
        insort(self.lanes.setdefault(lane, []), waiting, key=_key)
        self.tokens[lane] = self.tokens.get(lane, 0) + waiting.tokens
        self.tickets[waiting.ticket] = waiting

    def remove(self, ticket: int) -> Waiting | None:
        waiting = self.tickets.pop(ticket, None)
        if waiting is None:
            return None
        lane = (waiting.facts.kind, waiting.facts.model)
        line = self.lanes[lane]
        del line[bisect_left(line, waiting.key, key=_key)]  # keys are unique: they end with the ticket
        self.tokens[lane] -= waiting.tokens
        if not line:
            del self.lanes[lane], self.tokens[lane]
            self.behind.pop(lane, None)
        return waiting

    def look_at(self, lane: Lane, most: int) -> list[Waiting]:
        """Whom to offer room: the first so many, and as many of those behind them, other ones each time. Requests that
        can go nowhere yet (long prompts, say, while their instance is full) must not hide those that can."""
        line = self.lanes.get(lane, [])
        if len(line) <= most:
            return list(line)
        start = self.behind.get(lane, most)
        if start >= len(line):
            start = most
        self.behind[lane] = start + most
        return line[:most] + line[start : start + most]

    def expired(self, now: float, most: int) -> list[Waiting]:
        return list(islice((waiting for waiting in self.tickets.values() if now >= waiting.until), most))


def _key(waiting: Waiting) -> tuple[int, int, float, int]:
    return waiting.key
