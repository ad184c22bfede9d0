"""What every peer's picker shares: early binding over the eligible instances, and counts of its own requests.

A peer sends each request at once; those that find no room wait in the instance. Eligibility (kind, model, context
range, health) is the router's own filter, the same for all (DESIGN §6). A peer's gateway knows what its own
requests do (sent, first token, end) and what its real counterpart is told; nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from infermesh.errors import Reason
from registry.endpoint import Endpoint
from services.gateway.routing import filters
from services.gateway.routing.decision import Ask, Decision, Dispatch, Effect, Lease, Record, Refuse
from services.gateway.routing.facts import Facts, LoadReport, Outcome
from services.gateway.routing.policy import resolve
from services.gateway.simulator.fleet import Site
from services.gateway.simulator.ours import directory


class Peer:
    """A picker; `choose` is what the peers differ in. `active`: requests of this gateway in flight, by instance."""

    def __init__(self, name: str, site: Site, block_tokens: int, now: float) -> None:
        self.name = name
        self.endpoints = {endpoint.id: endpoint for endpoint in site.endpoints}
        self.block_tokens = block_tokens
        self.active = {endpoint.id: 0 for endpoint in site.endpoints}
        self._directory = directory(site, now)
        self._aliases = site.aliases
        self._seq = 0

    def choose(self, ids: list[str], facts: Facts, prompt: int, now: float, draw: float) -> str:
        """One of `ids`, which is sorted and not empty."""
        raise NotImplementedError

    def sent(self, id: str, lease: Lease, prompt: int, now: float) -> None:
        """It went there."""

    def first_token(self, lease: Lease) -> None:
        """Its prompt is computed."""

    def ended(self, lease: Lease) -> None:
        """It is over there."""

    def heard(self, id: str, load: LoadReport, now: float) -> None:
        """What the instance says of itself."""

    def pick(self, facts: Facts, now: float, draw: float) -> Decision:
        if variants := self._aliases.get(facts.model):  # the operator's weights hold for every policy
            model = resolve(variants, facts, draw, lambda name: (facts.kind, name) in self._directory.fleet.pools)
            facts = replace(facts, model=model)
        pool = self._directory.fleet.pools.get((facts.kind, facts.model), ())
        prompt, output = self._directory.estimate(facts)
        passed, rejected = filters.eligible(pool, facts, prompt)
        if not passed:
            record = Record(facts.kind, facts.model, reason=Reason.NO_INSTANCE.value, rejected=rejected)
            return Refuse(Reason.NO_INSTANCE, f"no instance of {facts.model} takes it", record)
        id = self.choose([instance.id for instance in passed], facts, prompt, now, draw)
        record = Record(facts.kind, facts.model, id, self.name, (), rejected, prompt, output)
        self._seq += 1
        lease = Lease(self._seq, id, self.endpoints[id].incarnation, facts, record)
        self.active[id] += 1
        self.sent(id, lease, prompt, now)
        return Dispatch(lease)

    def started(self, lease: Lease, now: float) -> list[Effect]:
        self.first_token(lease)
        return []

    def release(self, lease: Lease, outcome: Outcome, now: float) -> list[Effect]:
        self.active[lease.instance_id] -= 1
        self.ended(lease)
        return []

    def report(self, endpoint: Endpoint, load: LoadReport, now: float) -> list[Effect]:
        self.heard(endpoint.id, load, now)
        return []

    def cache(self, endpoint: Endpoint, stored: bool, chain: Sequence[int], now: float) -> list[Effect]:
        return []

    def tick(self, now: float) -> list[Effect]:
        return []

    def granted(self, endpoint: Endpoint, ticket: int, now: float) -> list[Effect]:
        return []

    def asks(self, now: float) -> list[Ask]:
        return []


class RoundRobin(Peer):
    """Each in turn. nginx and SMG `round_robin`: a counter over the healthy workers."""

    def __init__(self, name: str, site: Site, block_tokens: int, now: float) -> None:
        super().__init__(name, site, block_tokens, now)
        self._turn = 0

    def choose(self, ids: list[str], facts: Facts, prompt: int, now: float, draw: float) -> str:
        self._turn += 1
        return ids[(self._turn - 1) % len(ids)]


class LeastRequest(Peer):
    """The fewest of this gateway's requests in flight; chance among equals. nginx `least_conn`, LiteLLM `least-busy`,
    AIBrix `least-request`."""

    def choose(self, ids: list[str], facts: Facts, prompt: int, now: float, draw: float) -> str:
        fewest = min(self.active[id] for id in ids)
        best = [id for id in ids if self.active[id] == fewest]
        return best[int(draw * len(best))]


class PowerOfTwo(Peer):
    """Two different ones by chance, and of them the one with fewer requests in flight. SMG and vllm-router
    `power_of_two` on request counts; Mitzenmacher, "The power of two choices in randomized load balancing" (2001)."""

    def choose(self, ids: list[str], facts: Facts, prompt: int, now: float, draw: float) -> str:
        count = len(ids)
        if count == 1:
            return ids[0]
        pair = int(draw * count * (count - 1))
        one, other = divmod(pair, count - 1)
        other += other >= one
        return ids[one] if self.active[ids[one]] <= self.active[ids[other]] else ids[other]
