"""The bounded wait: how much of it there is, whose it is, and where each request stands.

Each model has bounds of its own, so that a full one delays nobody else. A request stands in the line of the instance
that would take it as things are; where nobody could take it yet, it is `unplaced`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from services.chassis.fairness import Turns
from services.gateway.routing.affinity import shared_blocks
from services.gateway.routing.facts import Facts
from services.gateway.routing.fleet import Instance
from services.gateway.routing.line import OVERDUE, Waiting

Lane = tuple[str, str]  # kind, model
FAMILY = 64  # relatives of a request that are looked at


@dataclass(frozen=True, slots=True)
class Bounds:
    """`max_tokens`: estimated prompt + answer of a lane's requests."""

    max_requests: int = 1024
    max_tokens: int = 8 << 20
    max_wait_s: float = 30.0


@dataclass(slots=True)
class Queue:
    """`turns`: what each tenant was given."""

    bounds: Bounds
    tickets: dict[int, Waiting] = field(default_factory=dict)
    requests: dict[Lane, int] = field(default_factory=dict)
    tokens: dict[Lane, int] = field(default_factory=dict)
    unplaced: dict[int, Waiting] = field(default_factory=dict)
    homes: dict[str, Instance] = field(default_factory=dict)
    turns: Turns = field(default_factory=Turns)
    shares: dict[tuple[Lane, str], tuple[int, int]] = field(default_factory=dict)  # requests and tokens of each tenant
    last_ticket: int = 0
    touched: set[str] = field(default_factory=set)  # instances whose line has changed since they were told
    families: dict[int, dict[int, Waiting]] = field(default_factory=dict)  # first block of a chain -> who waits with it
    lacking: dict[int, dict[int, Waiting]] = field(default_factory=dict)  # first block that is not at home -> the same

    def next_ticket(self) -> int:
        self.last_ticket += 1
        return self.last_ticket

    def full(self, lane: Lane, tokens: int, tenant: str) -> str:
        """Which bound the next request would break; empty if none. A lane that is empty takes any one request, and one
        that others have filled still takes a tenant's equal share: twice the bounds at most."""
        count, bounds = self.requests.get(lane, 0), self.bounds
        own, own_tokens = self.shares.get((lane, tenant), (0, 0))
        tenants = len(self.turns.waiting) + (tenant not in self.turns.waiting)
        if count >= bounds.max_requests and own >= bounds.max_requests // tenants:
            return f"{count} requests wait already"
        full = bool(count) and self.tokens[lane] + tokens > bounds.max_tokens
        if full and own_tokens + tokens > bounds.max_tokens // tenants:
            return f"{self.tokens[lane]} tokens of work wait already"
        return ""

    def add(self, waiting: Waiting) -> None:
        facts = waiting.facts
        lane, tenant = (facts.kind, facts.model), facts.tenant
        self.tickets[waiting.ticket] = self.unplaced[waiting.ticket] = waiting
        if facts.chain:
            self.families.setdefault(facts.chain[0], {})[waiting.ticket] = waiting
        self.requests[lane] = self.requests.get(lane, 0) + 1
        self.tokens[lane] = self.tokens.get(lane, 0) + waiting.tokens
        own, own_tokens = self.shares.get((lane, tenant), (0, 0))
        self.shares[lane, tenant] = own + 1, own_tokens + waiting.tokens
        self.turns.came(tenant)

    def place(self, waiting: Waiting, instance: Instance | None, work: float, saved: float) -> None:
        """Puts an unplaced request into an instance's line; None leaves it unplaced."""
        if instance is not None:
            del self.unplaced[waiting.ticket]
            instance.line.add(waiting, instance.id, work, saved)
            instance.ledger.holdings.see(waiting.facts.tenant)
            self.homes[instance.id] = instance
            self.touched.add(instance.id)
            waiting.lacked = waiting.lacks()
            if waiting.lacked is not None:
                self.lacking.setdefault(waiting.lacked, {})[waiting.ticket] = waiting

    def lift(self, waiting: Waiting) -> None:
        """Takes it out of its line; it keeps its ticket."""
        if not waiting.home:
            return
        instance = self.homes[waiting.home]
        if waiting.lacked is not None:
            _drop(self.lacking, waiting.lacked, waiting.ticket)
            waiting.lacked = None
        instance.line.remove(waiting)
        self.touched.add(instance.id)
        if not instance.line.count:
            del self.homes[instance.id]
        self.unplaced[waiting.ticket] = waiting

    def remove(self, ticket: int) -> Waiting | None:
        waiting = self.tickets.pop(ticket, None)
        if waiting is None:
            return None
        self.lift(waiting)
        del self.unplaced[ticket]
        facts = waiting.facts
        lane, tenant = (facts.kind, facts.model), facts.tenant
        if facts.chain:
            _drop(self.families, facts.chain[0], ticket)
        self.requests[lane] -= 1
        self.tokens[lane] -= waiting.tokens
        if not self.requests[lane]:
            del self.requests[lane], self.tokens[lane]
        own, own_tokens = self.shares.pop((lane, tenant))
        if own > 1:
            self.shares[lane, tenant] = own - 1, own_tokens - waiting.tokens
        self.turns.left(tenant)
        return waiting

    def promised(self, facts: Facts, ticket: int = 0) -> dict[str, float]:
        """Instance -> the part of the prompt that others who wait for it will have computed there."""
        found: dict[str, float] = {}
        if facts.chain:
            for waiting in islice(self.families.get(facts.chain[0], {}).values(), FAMILY):
                if waiting.home and waiting.ticket != ticket:
                    share = min(1.0, shared_blocks(waiting.facts.chain, facts.chain) * facts.chain_share)
                    found[waiting.home] = max(share, found.get(waiting.home, 0.0))
        return found

    def age(self, now: float, target: float) -> None:
        """Moves those whose place in the order time has changed. `target`: seconds to the first token, for those who
        ask for nothing else."""
        limit = now - OVERDUE * self.bounds.max_wait_s
        for waiting in list(self.tickets.values()):
            facts = waiting.facts
            late = waiting.late or now + waiting.work > facts.since + (facts.ttft_target_s or target)
            overdue = waiting.overdue or facts.since < limit
            if (late, overdue) != (waiting.late, waiting.overdue):
                home, work, saved = waiting.home, waiting.work, waiting.saved
                instance = self.homes.get(home)
                self.lift(waiting)
                waiting.late, waiting.overdue = late, overdue
                if instance is not None:
                    self.place(waiting, instance, work, saved)

    def relatives(self, facts: Facts) -> list[Waiting]:
        """Some of those who wait with the same beginning."""
        return list(islice(self.families.get(facts.chain[0], {}).values(), FAMILY)) if facts.chain else []

    def lack(self, blocks: Iterable[int]) -> list[Waiting]:
        """Some of those who wait for an instance that did not have one of these yet, as the next of their prompt."""
        lacking = self.lacking
        found = (waiting for block in blocks if block in lacking for waiting in lacking[block].values())
        return list(islice(found, FAMILY)) if lacking else []

    def expired(self, now: float, most: int) -> list[Waiting]:
        return list(islice((waiting for waiting in self.tickets.values() if now >= waiting.until), most))


def _drop(index: dict[int, dict[int, Waiting]], block: int, ticket: int) -> None:
    del index[block][ticket]
    if not index[block]:
        del index[block]
