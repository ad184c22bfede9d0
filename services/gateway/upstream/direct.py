"""Direct mode: a caller asks where to, calls the instance itself, and says how it went (docs/decisions/0040).

A lease ends once: with its report, or 10 s after its deadline. What a caller says gives the reservation back and may
have the instance asked whether it is well; it proves nothing, so health, speeds and estimates do not learn from it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from infermesh.errors import MeshError, Reason
from infermesh.transport import Trust
from infermesh.v1.inference_pb2 import Relay
from registry.endpoint import Endpoint
from services.chassis.identity import REQUEST_KEY
from services.gateway.report import OK, Report, Tried
from services.gateway.routing.decision import Lease, Probe, Record, Refuse
from services.gateway.routing.facts import End, Facts, Outcome
from services.gateway.upstream.calls import Call
from services.gateway.upstream.failures import refusal, word
from services.gateway.upstream.forward import Forwarder

GRACE_S = 10.0  # after the deadline, for the report to come
MOST = 1024  # leases of one tenant at a time
ASKS = frozenset({Reason.INSTANCE_LOST.value, Reason.STREAM_LOST.value, Reason.ENGINE_FAILED.value})
LEFT = Outcome(End.CANCELLED)  # says nothing of the instance


@dataclass(frozen=True, slots=True)
class Picked:
    """Whom to call, and with what. `ids`: of instance and model as callers may see them. `expires_s`: from now. `tls`:
    whose certificates are good; None = in the clear."""

    id: str
    address: str
    ids: tuple[str, str]
    degraded_from: str
    relay: Relay
    metadata: dict[str, str]
    expires_s: float
    tls: Trust | None


@dataclass(slots=True)
class _Errand:
    """One request from `pick` to its end."""

    call: Call
    facts: Facts
    begun: float
    reserved: int = 0  # tokens of the tenant's minute
    record: Record | None = None
    lease: Lease | None = None
    endpoint: Endpoint | None = None
    spans: Any = None
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Direct:
    """`tls`: how instances are spoken to."""

    def __init__(self, forwarder: Forwarder, tls: Trust | None = None) -> None:
        self._forwarder = forwarder
        self._carrier = forwarder.carrier
        self._tls = tls
        self._held: dict[str, _Errand] = {}
        self._tenants: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Leases that neither report nor time has ended."""
        return len(self._held)

    async def pick(self, facts: Facts, call: Call) -> Picked:
        """A reservation, as for a request that is forwarded. `facts`: of the request; whose it is comes from `call`.

        Raises:
            MeshError: as a forwarded request; QUEUE_FULL also for a tenant with too many leases.
        """
        forwarder, caller, now = self._forwarder, call.caller, self._carrier.now()
        facts = replace(
            facts,
            excluded=self._ids(facts.excluded),
            tenant=caller.tenant,
            klass=caller.klass,
            allowed=caller.models,
            deadline=forwarder.deadline(call, now),
            since=now,
        )
        errand = _Errand(call, facts, now)
        errand.spans = forwarder.observe.trace("DIRECT", call)
        self._tenants[caller.tenant] += 1
        forwarder.enter()
        try:
            forwarder.admit()
            if self._tenants[caller.tenant] > MOST:
                message = f"{MOST} leases of this tenant are open already; each ends with its report"
                raise MeshError(Reason.QUEUE_FULL, message, retry_after_s=1.0)
            errand.reserved = forwarder.charge(facts, caller, now)
            decision = await forwarder.choose(facts, now, lambda record: setattr(errand, "record", record))
            if isinstance(decision, Refuse):
                self._decided(errand, decision.record)
                raise refusal(decision, None)
            errand.lease = decision.lease
            self._decided(errand, decision.lease.record)
            return self._lend(errand, decision.lease)
        except BaseException as error:
            self._end(errand, word(error), error=error)
            raise
        finally:
            forwarder.leave()

    def report(self, lease_id: str, tenant: str, outcome: str, tokens: tuple[int, int] = (0, 0)) -> None:
        """Ends a lease. `outcome`: `ok` or the word of a Reason. `tokens`: of prompt and answer, 0 = not told.

        Raises:
            MeshError: NOT_FOUND, for a lease that has ended, or is of another tenant or gateway.
        """
        errand = self._held.get(lease_id)
        if errand is None or errand.call.caller.tenant != tenant:
            why = "it was reported, its time is over, or it is of another tenant or gateway"
            raise MeshError(Reason.NOT_FOUND, f"there is no lease {lease_id[:64]!r} here: {why}", param="lease_id")
        self._return(lease_id, outcome, tokens)

    def _ids(self, named: frozenset[str]) -> frozenset[str]:
        """Of instances named by address, too: callers may have been told other ids, or none."""
        if not named:
            return named
        found = self._carrier.router.fleet.instances.items()
        return frozenset(id for id, one in found if id in named or one.endpoint.address in named)

    def _decided(self, errand: _Errand, record: Record) -> None:
        errand.record = record
        if errand.spans is not None:
            errand.spans.decided(record)

    def _lend(self, errand: _Errand, lease: Lease) -> Picked:
        forwarder, call = self._forwarder, errand.call
        instance = self._carrier.router.fleet.life(lease.instance_id, lease.incarnation)
        if instance is None:
            raise MeshError(Reason.INSTANCE_LOST, "the instance has just gone")
        errand.endpoint = endpoint = instance.endpoint
        relay = Relay(
            served_model=endpoint.model if endpoint.model != errand.facts.model else "",
            cache_salt=forwarder.salt(call.caller.tenant),
            rendered_at=forwarder.rendered_at(),
        )
        forwarder.stamp(relay, lease, call.caller.tenant, 1)
        trace = dict(call.trace)
        if errand.spans is not None:
            trace = errand.spans.attempt(lease, 1, endpoint.model, self._carrier.greeted(lease))
        lent = self._carrier.lent(endpoint, relay)
        expires_s = max(0.0, errand.facts.deadline - self._carrier.now()) + GRACE_S
        id = secrets.token_hex(16)
        self._held[id] = errand
        errand.timer = asyncio.get_running_loop().call_later(
            expires_s, self._return, id, Reason.DEADLINE_EXCEEDED.value
        )
        return Picked(
            id,
            endpoint.address,
            forwarder.showing.ids(endpoint),
            lease.record.degraded_from,
            relay,
            {REQUEST_KEY: call.request_id, **trace, **lent},
            expires_s,
            self._tls,
        )

    def _return(self, lease_id: str, outcome: str, tokens: tuple[int, int] = (0, 0)) -> None:
        errand = self._held.pop(lease_id)
        if errand.timer is not None:
            errand.timer.cancel()
        self._end(errand, outcome, tokens)
        if outcome in ASKS and errand.lease is not None:
            self._carrier.do([Probe(errand.lease.instance_id)])

    def _end(
        self,
        errand: _Errand,
        outcome: str,
        tokens: tuple[int, int] = (0, 0),
        error: BaseException | None = None,
    ) -> None:
        """Ends a request, once: it is no longer held, or never was."""
        forwarder, call, lease, endpoint = self._forwarder, errand.call, errand.lease, errand.endpoint
        tenant = call.caller.tenant
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        if lease is not None:
            self._carrier.release(lease, LEFT)
        if errand.reserved:  # a caller's word earns nothing back of what was begun
            forwarder.quota.settle(tenant, errand.reserved, max(errand.reserved, sum(tokens)) if endpoint else 0)
        spans = errand.spans
        report = Report(
            request_id=call.request_id,
            method="direct",
            tenant=tenant,
            model=errand.facts.model,
            outcome=outcome,
            instance=endpoint.id if endpoint else "",
            served_model=endpoint.model if endpoint else "",
            attempts=1 if endpoint else 0,
            duration_s=self._carrier.now() - errand.begun,
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            record=errand.record,
            tried=(Tried(errand.record, outcome),) if errand.record is not None else (),
            facts=errand.facts if errand.record is not None else None,
            trace_id=call.trace_id if spans is None else spans.trace_id,
        )
        forwarder.observe.finished(report, error)
        if spans is not None:
            if endpoint is not None:
                spans.attempt_ended(outcome, None, 0.0, tokens[1])
            spans.ended(report, outcome == OK)
