"""One request from its arrival to its end: pick -> lease -> call -> outcome -> next."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from infermesh.errors import MeshError, Reason
from registry.endpoint import Endpoint
from services.chassis.identity import REQUEST_KEY
from services.gateway.observe import Report, Tried
from services.gateway.routing import failover
from services.gateway.routing.decision import Lease, Record, Refuse, Wait
from services.gateway.routing.facts import Facts
from services.gateway.upstream.attempt import Attempt
from services.gateway.upstream.calls import Call, Event, Identity, Method
from services.gateway.upstream.describe import check, describe
from services.gateway.upstream.failures import (
    as_failure,
    exact_prompt_tokens,
    refusal,
    stream_lost,
    we_were_cancelled,
    word,
)

if TYPE_CHECKING:
    from services.gateway.upstream.forward import Forwarder


class Exchange:
    """The context manager that `Forwarder.open` gives, and the reply that it yields. Used once, by one task."""

    __slots__ = (
        "_ahead", "_attempt", "_begun", "_carrier", "_context", "_deadline", "_endpoint", "_events", "_facts",
        "_finished", "_first", "_forwarder", "_last", "_method", "_record", "_request", "_reserved", "_retrying",
        "_spans", "_spent", "_tried", "attempts", "identity",
    )  # fmt: skip

    def __init__(self, forwarder: Forwarder, method: Method, request: Any, call: Call) -> None:
        self._forwarder = forwarder
        self._carrier = forwarder.carrier
        self._method = method
        self._request = request
        self._context = call
        self._ahead: deque[Event] = deque()  # of a collected answer
        self._first: Event | None = None
        self._attempt: Attempt | None = None  # under way
        self._last: Attempt | None = None  # the one that answered, also after its end
        self._endpoint: Endpoint | None = None  # called last
        self._record: Record | None = None
        self._facts: Facts
        self._tried: list[Tried] = []
        self._spent = 0  # attempts that may have begun work
        self._events = 0  # that the caller has
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
            self._admit(now)
            await self._pursue()
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
        attempt = self._attempt
        if attempt is None:
            raise StopAsyncIteration
        try:
            event = await attempt.read()
        except (asyncio.CancelledError, Exception) as error:
            if we_were_cancelled(error):
                raise
            lost = stream_lost(as_failure(error), self.identity.instance_id, attempt.tokens, self._events)
            self._finish(lost)
            raise lost from None
        if event is None:
            self._finish(None)
            raise StopAsyncIteration
        self._events += 1
        return event

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        """The checks and the books that come before the first attempt."""
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

    async def _pursue(self) -> None:
        """One attempt after the other, until one has begun to answer."""
        failure: MeshError | None = None
        while True:
            lease = await self._reserve(failure)
            try:
                await self._try(lease)
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
            self._record = decision.record  # all there will be, should the caller leave meanwhile
            gauge = self._forwarder.observe.waiting
            gauge.inc()
            try:
                decision = await carrier.wait(decision.ticket)
            finally:
                gauge.dec()
        if isinstance(decision, Refuse):
            self._record = decision.record
            self._tried.append(Tried(decision.record, decision.reason.value))
            raise refusal(decision, failure)
        self._record = decision.lease.record
        return decision.lease

    async def _try(self, lease: Lease) -> None:
        """Calls the instance and waits for the first event; for all of them where the caller wants the whole."""
        carrier, method = self._carrier, self._method
        instance = carrier.router.fleet.life(lease.instance_id, lease.incarnation)
        if instance is None:
            raise MeshError(Reason.INSTANCE_LOST, f"{lease.instance_id} has just gone")
        self._endpoint = endpoint = instance.endpoint
        attempt = self._attempt = self._last = Attempt(carrier, method, lease, endpoint, self._begun)
        self.attempts += 1
        request = self._amend(lease, endpoint.model)
        timeout = self._deadline - carrier.now()
        if timeout <= 0:
            raise MeshError(Reason.DEADLINE_EXCEEDED, "the deadline passed before an instance was called")
        first = await attempt.begin(request, timeout, self._metadata(lease, endpoint.model))
        self._stop_retrying()
        self.identity = Identity(endpoint.id, endpoint.model, self.attempts, lease.record.degraded_from)
        if method.streams and self._context.collected:
            while (event := await attempt.read()) is not None:
                self._ahead.append(event)
            self._finish(None)
        self._first = first
        if not method.streams:
            self._events = 1
            self._finish(None)

    def _amend(self, lease: Lease, model: str) -> bytes:
        """The request as this instance is to see it."""
        forwarder, request = self._forwarder, self._request
        relay = request.relay
        relay.served_model = model if model != request.model else ""
        relay.gateway_id = forwarder.gateway_id
        relay.seq = lease.seq
        relay.attempt = self.attempts
        relay.tenant = self._context.caller.tenant
        return request.SerializeToString()

    def _metadata(self, lease: Lease, model: str) -> tuple[tuple[str, str], ...]:
        trace = self._context.trace
        if self._spans is not None:
            trace = self._spans.attempt(lease, self.attempts, model)
        return ((REQUEST_KEY, self._context.request_id), *self._carrier.metadata, *trace.items())

    def _after(self, lease: Lease, failure: MeshError, error: BaseException) -> None:
        """After a failed attempt: gives the lease back, then either prepares the next one or raises the failure."""
        self._tried.append(Tried(lease.record, failure.reason.value))
        self._release(failure)
        self._ahead.clear()
        self._last = None
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
        """Ends the attempt under way: its call, its lease, its span."""
        attempt, self._attempt = self._attempt, None
        if self._spans is not None:
            self._spans.attempt_ended(word(failure), failure is not None)
        if attempt is not None:
            attempt.end(failure)

    def _stop_retrying(self) -> None:
        if self._retrying:
            self._retrying = False
            self._forwarder.budget.retrying -= 1

    def _finish(self, error: BaseException | None) -> None:
        """Ends the request, once."""
        if self._finished:
            return
        self._finished = True
        forwarder, caller, last = self._forwarder, self._context.caller, self._last
        self._stop_retrying()
        if self._attempt is not None:
            self._tried.append(Tried(self._attempt.lease.record, word(error)))
        self._release(error)
        forwarder.leave()
        usage = last.usage if last is not None else None
        ttft_s = last.ttft_s if last is not None else 0.0
        prompt = usage.prompt_tokens if usage is not None else 0
        completion = usage.completion_tokens if usage is not None else last.tokens if last is not None else 0
        if self._reserved:
            started = self._facts.prompt_tokens or self._carrier.router.estimate(self._facts)[0]
            used = prompt + completion if usage is not None else (started + completion if ttft_s else 0)
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
            ttft_s=ttft_s,
            duration_s=self._carrier.now() - self._begun,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=usage.cached_tokens if usage is not None else 0,
            record=self._record,
            tried=tuple(self._tried),
            facts=self._facts if self._record is not None else None,
        )
        forwarder.observe.finished(report, error)
        if self._spans is not None:
            self._spans.ended(outcome, error is not None, prompt, completion, report.served_model)
