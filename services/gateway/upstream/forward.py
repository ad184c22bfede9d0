"""The one loop of every request: pick -> lease -> call -> outcome -> next."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import grpc.aio

from infermesh.errors import MeshError, Reason
from registry.endpoint import Endpoint
from services.chassis.identity import INSTANCE_KEY, REQUEST_KEY
from services.gateway.config import Limits
from services.gateway.observe import Observe, Report
from services.gateway.routing import failover
from services.gateway.routing.decision import Lease, Record, Refuse, Wait
from services.gateway.routing.facts import Facts, Outcome
from services.gateway.upstream.calls import Call, Event, Identity, Method
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.describe import check, describe
from services.gateway.upstream.failures import (
    as_failure,
    end,
    exact_prompt_tokens,
    refusal,
    stream_lost,
    we_were_cancelled,
    word,
)
from services.gateway.upstream.quota import Quota


@dataclass(slots=True)
class Forwarder:
    """Implements `calls.Forward`. `secret` separates the tenants' prefix caches; all gateways of a mesh share it."""

    carrier: Carrier
    observe: Observe
    gateway_id: str
    limits: Limits = field(default_factory=Limits)
    secret: bytes = b"infermesh"
    time_granularity_s: int = 86_400
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
        self.budget.live += 1
        self.observe.in_flight.set(self.budget.live)
        self.idle.clear()

    def leave(self) -> None:
        self.budget.live -= 1
        self.observe.in_flight.set(self.budget.live)
        if not self.budget.live:
            self.idle.set()


class Exchange:
    """One request: the context manager that `open` gives, and the reply that it yields. Used once, by one task."""

    __slots__ = (
        *(
            "_ahead",
            "_begun",
            "_call",
            "_carrier",
            "_context",
            "_deadline",
            "_endpoint",
            "_events",
            "_facts",
            "_finished",
        ),
        *(
            "_first",
            "_forwarder",
            "_lease",
            "_method",
            "_record",
            "_request",
            "_reserved",
            "_retrying",
            "_spans",
            "_spent",
        ),
        *("_tokens", "_ttft", "_usage", "attempts", "identity"),
    )

    def __init__(self, forwarder: Forwarder, method: Method, request: Any, call: Call) -> None:
        self._forwarder = forwarder
        self._carrier = forwarder.carrier
        self._method = method
        self._request = request
        self._context = call
        self._ahead: deque[Event] = deque()  # of a collected answer
        self._call: Any = None
        self._endpoint: Endpoint | None = None
        self._first: Event | None = None
        self._lease: Lease | None = None
        self._record: Record | None = None
        self._facts: Facts
        self._spent = 0  # attempts that may have begun work
        self._usage: Any = None
        self._events = 0
        self._tokens = 0
        self._ttft = 0.0
        self._reserved = 0
        self._retrying = False
        self._finished = False
        self._spans = forwarder.observe.trace(method.name, call.trace)
        self.attempts = 0
        self.identity = Identity("", "")

    # -- the front's view -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Exchange:
        forwarder = self._forwarder
        now = self._begun = self._carrier.now()
        limit = now + forwarder.limits.default_deadline_s
        self._deadline = min(self._context.deadline or limit, limit)
        forwarder.enter()
        try:
            await self._open(now)
        except BaseException as error:
            self._finish(error)
            raise
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        if not self._finished:
            if error is None or isinstance(error, GeneratorExit):
                error = MeshError(Reason.CANCELLED, "the caller left")
            self._finish(error)

    def __aiter__(self) -> Exchange:
        return self

    async def __anext__(self) -> Event:
        event = self._first
        if event is not None:
            self._first = None
            self._events = 1
            return event
        if self._ahead:
            self._events += 1
            return self._ahead.popleft()
        if self._finished:
            raise StopAsyncIteration
        try:
            if self._lease is not None:
                self._carrier.router.heeding(self._lease)
            raw = await self._call.read()
            if raw is grpc.aio.EOF:
                self._finish(None)
                raise StopAsyncIteration
            message = self._method.response.FromString(raw)
        except (asyncio.CancelledError, Exception) as error:
            if isinstance(error, StopAsyncIteration) or we_were_cancelled(error):
                raise
            lost = stream_lost(as_failure(error), self.identity.instance_id, self._tokens, self._events)
            self._finish(lost)
            raise lost from None
        self._note(message)
        self._events += 1
        return Event(raw, message)

    # -- the loop ---------------------------------------------------------------------------------------------------

    async def _open(self, now: float) -> None:
        forwarder, caller = self._forwarder, self._context.caller
        check(self._method, self._request, caller)
        if forwarder.budget.live > forwarder.limits.max_concurrent:
            message = f"{forwarder.limits.max_concurrent} requests are in this gateway already"
            raise MeshError(Reason.QUEUE_FULL, message, retry_after_s=1.0)
        salt = forwarder.salt(caller.tenant)
        granularity_s = forwarder.time_granularity_s
        rendered_at = int(time.time()) // granularity_s * granularity_s  # once: another rendering gives the same tokens
        self._facts = facts = describe(self._method, self._request, caller, self._deadline, now, salt, rendered_at)
        relay = self._request.relay  # what of it is the same at every attempt; `_amend` sets the rest
        relay.cache_salt, relay.rendered_at = salt, rendered_at
        relay.prefix_chain.extend(facts.chain)
        if caller.tokens_per_minute:
            tokens = sum(self._carrier.router.estimate(facts))
            self._reserved = forwarder.quota.reserve(caller.tenant, caller.tokens_per_minute, tokens, now)
        failure: MeshError | None = None
        while True:
            lease = await self._reserve(failure)
            try:
                await self._attempt(lease)
                return
            except (asyncio.CancelledError, Exception) as error:
                if we_were_cancelled(error):
                    raise
                failure = as_failure(error)
                self._after(lease, failure, error)

    async def _reserve(self, failure: MeshError | None) -> Lease:
        """A lease, at once or after waiting. `failure` is why the attempt before it failed."""
        carrier = self._carrier
        decision = carrier.router.pick(self._facts, carrier.now(), self._forwarder.draw.random())
        if isinstance(decision, Wait):
            gauge = self._forwarder.observe.waiting
            gauge.inc()
            try:
                decision = await carrier.wait(decision.ticket)
            finally:
                gauge.dec()
        if isinstance(decision, Refuse):
            self._record = decision.record
            raise refusal(decision, failure)
        self._lease = decision.lease
        self._record = decision.lease.record
        return decision.lease

    async def _attempt(self, lease: Lease) -> None:
        """Calls the instance and waits for the first event."""
        carrier, method = self._carrier, self._method
        instance = carrier.router.fleet.life(lease.instance_id, lease.incarnation)
        if instance is None:
            raise MeshError(Reason.INSTANCE_LOST, f"{lease.instance_id} has just gone")
        self.attempts += 1
        endpoint = self._endpoint = instance.endpoint
        request = self._amend(lease, endpoint)
        timeout = self._deadline - carrier.now()
        if timeout <= 0:
            raise MeshError(Reason.DEADLINE_EXCEEDED, "the deadline passed before an instance was called")
        dial = carrier.channels.open(endpoint).calls[method]
        call = self._call = dial(request, timeout=timeout, metadata=self._metadata(lease, endpoint))
        carrier.attach(lease, call)
        first = await call.read() if method.streams else await call
        if first is grpc.aio.EOF:
            raise MeshError(Reason.ENGINE_FAILED, f"{endpoint.id} ended the answer before it began")
        self._verify(await call.initial_metadata(), endpoint)
        message = method.response.FromString(first)
        self._ttft = carrier.now() - self._begun
        carrier.do(carrier.router.started(lease, carrier.now()))
        self._stop_retrying()
        self.identity = Identity(endpoint.id, endpoint.model, self.attempts, lease.record.degraded_from)
        self._note(message)
        if method.streams and self._context.collected:
            while True:
                carrier.router.heeding(lease)
                if (raw := await call.read()) is grpc.aio.EOF:
                    break
                self._ahead.append(Event(raw, method.response.FromString(raw)))
                self._note(self._ahead[-1].message)
            self._finish(None)
        self._first = Event(first, message)
        if not method.streams:
            self._events = 1
            self._finish(None)

    def _amend(self, lease: Lease, endpoint: Endpoint) -> bytes:
        """The request as this instance is to see it."""
        forwarder, request = self._forwarder, self._request
        relay = request.relay
        relay.served_model = endpoint.model if endpoint.model != request.model else ""
        relay.gateway_id = forwarder.gateway_id
        relay.seq = lease.seq
        relay.attempt = self.attempts
        relay.tenant = self._context.caller.tenant
        return request.SerializeToString()

    def _metadata(self, lease: Lease, endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
        trace = self._context.trace
        if self._spans is not None:
            trace = self._spans.attempt(lease, self.attempts, endpoint.model)
        return ((REQUEST_KEY, self._context.request_id), *self._carrier.metadata, *trace.items())

    def _verify(self, initial: Any, endpoint: Endpoint) -> None:
        """It must be the instance that was picked."""
        answered = (initial or {}).get(INSTANCE_KEY, "")
        if answered != endpoint.id:
            message = f"{endpoint.address} answered as {answered or 'nobody'}, registered is {endpoint.id}"
            raise MeshError(Reason.INSTANCE_LOST, message)

    def _note(self, message: Any) -> None:
        """Counts what an event carries."""
        if self._method.streams:
            self._tokens += (tokens := sum(len(delta.token_ids) for delta in message.deltas))
            if self._lease is not None:
                self._carrier.router.progressed(self._lease, tokens)
        elif self._method.kind == "llm":
            return
        if message.HasField("usage"):
            self._usage = message.usage

    def _after(self, lease: Lease, failure: MeshError, error: BaseException) -> None:
        """After a failed attempt: gives the lease back, then either prepares the next one or raises the failure."""
        self._release(failure)
        self._ahead.clear()
        self._usage, self._tokens, self._ttft = None, 0, 0.0
        forwarder, reason = self._forwarder, failure.reason
        self._spent += reason not in failover.FREE
        left = self._deadline - self._carrier.now()
        progress = failover.Progress(self._spent, self._events, left)
        if failover.next(reason, progress, forwarder.budget) is not failover.Next.OTHER:
            raise failure from None
        facts = self._facts
        if reason in (Reason.INSTANCE_FULL, Reason.STARTING):
            return  # the router leaves it alone for a moment; others, or the queue, take the request
        excluded = facts.excluded | {lease.instance_id}
        counted = exact_prompt_tokens(error, failure) if reason is Reason.OUT_OF_RANGE else 0
        if counted:
            self._facts = replace(facts, excluded=excluded, prompt_tokens=counted, counted=True)
        else:
            self._facts = replace(facts, excluded=excluded)
        forwarder.observe.retried(reason.value)
        if reason not in failover.UNBUDGETED and not self._retrying:
            self._retrying = True
            forwarder.budget.retrying += 1

    # -- the end ----------------------------------------------------------------------------------------------------

    def _release(self, failure: BaseException | None) -> None:
        """Ends the attempt: its call, its lease, its span."""
        call, self._call = self._call, None
        if call is not None and not call.done():
            call.cancel()
        lease, self._lease = self._lease, None
        if self._spans is not None:
            self._spans.attempt_ended(word(failure), failure is not None)
        if lease is None:
            return
        self._carrier.detach(lease)
        now = self._carrier.now()
        usage = self._usage
        outcome = Outcome(
            end(failure),
            failure.reason if isinstance(failure, MeshError) else None,
            usage.prompt_tokens if usage is not None else 0,
            usage.completion_tokens if usage is not None else self._tokens,
            self._ttft,
            now - self._begun,
            usage.cached_tokens if usage is not None and self._method.streams else None,
        )
        self._carrier.release(lease, outcome)

    def _stop_retrying(self) -> None:
        if self._retrying:
            self._retrying = False
            self._forwarder.budget.retrying -= 1

    def _finish(self, error: BaseException | None) -> None:
        """Ends the request, once."""
        if self._finished:
            return
        self._finished = True
        forwarder, caller, usage = self._forwarder, self._context.caller, self._usage
        self._stop_retrying()
        self._release(error)
        forwarder.leave()
        prompt = usage.prompt_tokens if usage is not None else 0
        completion = usage.completion_tokens if usage is not None else self._tokens
        if self._reserved:
            started = self._facts.prompt_tokens or self._carrier.router.estimate(self._facts)[0]
            used = prompt + completion if usage is not None else (started + completion if self._ttft else 0)
            forwarder.quota.settle(caller.tenant, self._reserved, used)
        endpoint = self._endpoint
        outcome = word(error)
        report = Report(
            request_id=self._context.request_id,
            method=self._method.name.lower(),
            tenant=caller.tenant,
            model=self._request.model[:256],
            outcome=outcome,
            instance=endpoint.id if endpoint else "",
            served_model=endpoint.model if endpoint else "",
            attempts=self.attempts,
            ttft_s=self._ttft,
            duration_s=self._carrier.now() - self._begun,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=usage.cached_tokens if usage is not None else 0,
            record=self._record,
        )
        forwarder.observe.finished(report, error)
        if self._spans is not None:
            self._spans.ended(outcome, error is not None, prompt, completion, report.served_model)
