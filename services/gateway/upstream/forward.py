"""Where fronts hand requests in, and what all requests of this gateway share."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
from dataclasses import dataclass, field
from typing import Any

from services.gateway.config import Limits
from services.gateway.observe import Observe
from services.gateway.routing import failover
from services.gateway.upstream.calls import Call, Method
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

    def enter(self) -> None:
        self.budget.enter()
        self.observe.metrics.in_flight.set(self.budget.live)
        self.idle.clear()

    def leave(self) -> None:
        self.budget.live -= 1
        self.observe.metrics.in_flight.set(self.budget.live)
        if not self.budget.live:
            self.idle.set()
