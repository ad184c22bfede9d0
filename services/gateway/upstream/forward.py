"""Where fronts hand requests in, and what all requests of this gateway share."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from infermesh.errors import MeshError, Reason
from infermesh.v1.inference_pb2 import Relay
from services.gateway.config import Limits
from services.gateway.observe import Observe
from services.gateway.routing import failover
from services.gateway.routing.decision import Dispatch, Lease, Record, Refuse, Wait
from services.gateway.routing.facts import Facts
from services.gateway.upstream.calls import Call, Caller, Method
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.exchange import Exchange
from services.gateway.upstream.quota import Quota
from services.gateway.upstream.shown import Showing


@dataclass(slots=True)
class Forwarder:
    """Implements `calls.Forward`. `secret` separates the tenants' prefix caches; all gateways of a mesh share it."""

    carrier: Carrier
    observe: Observe
    gateway_id: str
    limits: Limits = field(default_factory=Limits)
    secret: bytes = b"infermesh"
    time_granularity_s: int = 86_400
    showing: Showing = field(default_factory=Showing)
    quota: Quota = field(default_factory=Quota)
    budget: failover.Budget = field(default_factory=failover.Budget)
    draw: random.Random = field(default_factory=random.Random)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    _salts: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.idle.set()

    def open(self, method: Method, request: Any, call: Call) -> Exchange:
        return Exchange(self, method, request, call)

    def salt(self, tenant: str) -> bytes:
        found = self._salts.get(tenant)
        if found is None:  # tenants come from the key file, so there are few
            found = self._salts[tenant] = hmac.digest(self.secret, tenant.encode(), hashlib.sha256)[:16]
        return found

    def deadline(self, call: Call, now: float) -> float:
        """Of a request that came just now."""
        limit = now + self.limits.default_deadline_s
        return min(call.deadline or limit, limit)

    def rendered_at(self) -> int:
        """Unix seconds that templates see; asked once a request, so that another rendering gives the same tokens."""
        return int(time.time()) // self.time_granularity_s * self.time_granularity_s

    def admit(self) -> None:
        """Raises MeshError: QUEUE_FULL."""
        if self.budget.live > self.limits.max_concurrent:
            message = f"{self.limits.max_concurrent} requests are in this gateway already"
            raise MeshError(Reason.QUEUE_FULL, message, retry_after_s=1.0)

    def charge(self, facts: Facts, caller: Caller, now: float) -> int:
        """Takes what the request is thought to need from the caller's tokens a minute. Returns what was taken.

        Raises:
            MeshError: RATE_LIMITED.
        """
        if not caller.tokens_per_minute:
            return 0
        tokens = sum(self.carrier.router.estimate(facts))
        return self.quota.reserve(caller.tenant, caller.tokens_per_minute, tokens, now)

    async def choose(self, facts: Facts, now: float, waits: Callable[[Record], None]) -> Dispatch | Refuse:
        """The router's decision, at once or after waiting, of which `waits` is told."""
        decision = self.carrier.router.pick(facts, now, self.draw.random())
        if not isinstance(decision, Wait):
            return decision
        waits(decision.record)
        gauge = self.observe.metrics.waiting
        gauge.inc()
        try:
            return await self.carrier.wait(decision.ticket)
        finally:
            gauge.dec()

    def stamp(self, relay: Relay, lease: Lease, tenant: str, attempt: int) -> None:
        """What an instance is to know of an attempt."""
        relay.gateway_id, relay.tenant, relay.attempt = self.gateway_id, tenant, attempt
        relay.seq, relay.grant = lease.seq, lease.grant
        relay.work_us, relay.kv_tokens, relay.cached_tokens = lease.work_us, lease.kv_tokens, lease.record.cached_tokens
        relay.patience_us, relay.rank = lease.patience_us, lease.rank
        relay.uncached_tokens = lease.record.prompt_tokens - lease.record.cached_tokens

    def enter(self) -> None:
        self.budget.enter()
        self.observe.metrics.in_flight.set(self.budget.live)
        self.idle.clear()

    def leave(self) -> None:
        self.budget.live -= 1
        self.observe.metrics.in_flight.set(self.budget.live)
        if not self.budget.live:
            self.idle.set()
