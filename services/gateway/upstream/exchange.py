"""One request from its arrival to its end: pick -> lease -> call -> outcome -> next."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from infermesh.errors import MeshError, Reason
from registry.endpoint import Endpoint
from services.chassis.identity import REQUEST_KEY
from services.gateway.report import Report, Tried
from services.gateway.routing import failover
from services.gateway.routing.decision import Lease, Record, Refuse
from services.gateway.routing.facts import Facts
from services.gateway.upstream.attempt import Attempt
from services.gateway.upstream.calls import Call, Event, Identity, Method
from services.gateway.upstream.continuation import Continuation
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
        "_ahead", "_attempt", "_begun", "_broken", "_carrier", "_context", "_deadline", "_endpoint", "_events",
        "_facts", "_finished", "_first", "_forwarder", "_kept", "_last", "_method", "_record", "_request", "_reserved",
        "_retrying", "_spans", "_spent", "_tried", "_ttft_s", "attempts", "identity",
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
        self._kept = Continuation(method, request, strict=call.collected)
        self._spent = 0  # attempts that may have begun work, in a row, and brought nothing
        self._broken = 0  # engines that failed at it
        self._ttft_s = 0.0
        self._events = 0  # that the caller has
        self._reserved = 0
        self._retrying = False
        self._finished = False
        self._spans = forwarder.observe.trace(method.name, call)
        self.attempts = 0
        self.identity = Identity("", "")

    # -- the front's view -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Exchange:
        forwarder = self._forwarder
        now = self._begun = self._carrier.now()
        self._deadline = forwarder.deadline(self._context, now)
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
            event = await self._go_on(attempt, error)
        if event is None:
            self._finish(None)
            raise StopAsyncIteration
        self._events += 1
        if self._kept.resumes:
            return self._kept.closing(event)
        return event

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        """The checks and the books that come before the first attempt."""
        forwarder, caller = self._forwarder, self._context.caller
        check(self._method, self._request, caller)
        forwarder.admit()
        salt, rendered_at = forwarder.salt(caller.tenant), forwarder.rendered_at()
        self._facts = facts = describe(self._method, self._request, caller, self._deadline, now, salt, rendered_at)
        relay = self._request.relay  # what of it is the same at every attempt; `_amend` sets the rest
        relay.cache_salt, relay.rendered_at = salt, rendered_at
        relay.prefix_chain.extend(facts.chain)
        self._reserved = forwarder.charge(facts, caller, now)

    async def _pursue(self, failure: MeshError | None = None) -> None:
        """One attempt after the other, until one has begun to answer. `failure`: why there must be another one."""
        while True:
            lease = await self._reserve(failure)
            try:
                await self._try(lease)
                return
            except (asyncio.CancelledError, Exception) as error:
                if we_were_cancelled(error):
                    raise
                failure = as_failure(error)
                if self._complete():
                    return
                self._after(lease, failure, error)

    async def _go_on(self, attempt: Attempt, error: BaseException) -> Event | None:
        """The event that follows where a stream broke: of another instance, which replays what the caller has."""
        if self._complete():
            return self._ahead.popleft()
        failure, origin = as_failure(error), self.identity.shown[0] or "its instance"
        try:
            self._after(attempt.lease, failure, error)
            await self._pursue(failure)
        except (asyncio.CancelledError, Exception) as last:
            if we_were_cancelled(last):
                raise
            refused = as_failure(last)
            obstacle = self._kept.obstacle or (refused.message if refused.message != failure.message else "")
            caused = refused if refused.reason is Reason.DEADLINE_EXCEEDED else failure
            lost = stream_lost(caused, origin, self._kept.before + self._brought(), self._events, obstacle)
            self._finish(lost)
            raise lost from None
        event, self._first = self._first, None
        return self._ahead.popleft() if event is None and self._ahead else event

    def _complete(self) -> bool:
        """Whether only the last event was lost, which we know ourselves: it is then among those ahead."""
        event = self._kept.end()
        if event is None:
            return False
        self._ahead.append(event)
        if self._last is not None:
            self._last.usage = event.message.usage
        self._finish(None)
        return True

    async def _reserve(self, failure: MeshError | None) -> Lease:
        """A lease, at once or after waiting. `failure` is why the attempt before it failed."""
        kept, now = self._kept, self._carrier.now()
        decision = await self._forwarder.choose(kept.facts(self._facts, now), now, self._waits)
        if isinstance(decision, Refuse):
            if kept.under_way and not self._events:
                self._begin_anew()
                return await self._reserve(failure)
            self._decided(decision.record)
            self._tried.append(Tried(decision.record, decision.reason.value))
            raise refusal(decision, None if kept.under_way else failure)
        self._decided(decision.lease.record)
        return decision.lease

    def _waits(self, record: Record) -> None:
        self._record = record  # all there will be, should the caller leave meanwhile

    def _decided(self, record: Record) -> None:
        self._record = record
        if self._spans is not None:
            self._spans.decided(record)

    async def _try(self, lease: Lease) -> None:
        """Calls the instance and waits for the first event; for all of them where the caller wants the whole."""
        carrier, method, kept = self._carrier, self._method, self._kept
        instance = carrier.router.fleet.life(lease.instance_id, lease.incarnation)
        if instance is None:
            raise MeshError(Reason.INSTANCE_LOST, "the instance has just gone")
        self._endpoint = endpoint = instance.endpoint
        kept.serve(endpoint)
        begun = carrier.now() if kept.under_way else self._begun
        attempt = self._attempt = self._last = Attempt(carrier, method, lease, endpoint, begun, kept.transcript)
        self.attempts += 1
        request = self._amend(lease, endpoint.model)
        timeout = self._deadline - carrier.now()
        if timeout <= 0:
            raise MeshError(Reason.DEADLINE_EXCEEDED, "the deadline passed before an instance was called")
        first = kept.began(await attempt.begin(request, timeout, self._metadata(lease, endpoint)), endpoint)
        self._stop_retrying()
        if kept.under_way:
            self._resumed(endpoint.id)
        else:
            self._ttft_s = attempt.ttft_s
        degraded = self.identity.degraded if kept.under_way else lease.record.degraded_from
        told = self._forwarder.showing.told(first, endpoint)
        self.identity = Identity(endpoint.id, endpoint.model, self.attempts, degraded, kept.resumes, kept.exact, told)
        if not method.streams:
            self._first = first
            self._events = 1
            self._finish(None)
        elif not self._context.collected:
            self._first = first
        else:
            event: Event | None = first
            while event is not None:
                self._ahead.append(event)
                event = await attempt.read()
            if kept.resumes:
                self._ahead[-1] = kept.closing(self._ahead[-1])
            self._finish(None)

    def _resumed(self, successor: str) -> None:
        kept, observe = self._kept, self._forwarder.observe
        pause_s = self._carrier.now() - kept.lost_at
        observe.resumed(self._context.request_id, kept.reason, successor, kept.before, pause_s, kept.exact)
        if self._spans is not None:
            self._spans.resumed(successor, kept.reason.value, kept.before, pause_s, kept.exact)

    def _amend(self, lease: Lease, model: str) -> bytes:
        """The request as this instance is to see it."""
        request = self._request
        relay = request.relay
        relay.served_model = model if model != request.model else ""
        self._forwarder.stamp(relay, lease, self._context.caller.tenant, self.attempts)
        if self._kept.under_way and self._kept.transcript is not None:
            relay.resume.CopyFrom(self._kept.transcript.resume())
        else:
            relay.ClearField("resume")
        return request.SerializeToString()

    def _metadata(self, lease: Lease, endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
        trace = self._context.trace
        if self._spans is not None:
            trace = self._spans.attempt(lease, self.attempts, endpoint.model, self._carrier.greeted(lease))
        return ((REQUEST_KEY, self._context.request_id), *self._carrier.credentials(endpoint), *trace.items())

    def _after(self, lease: Lease, failure: MeshError, error: BaseException) -> None:
        """After a failed attempt: gives the lease back, then either prepares the next one or raises the failure."""
        self._tried.append(Tried(lease.record, failure.reason.value))
        self._release(failure)
        forwarder, reason, kept, now = self._forwarder, failure.reason, self._kept, self._carrier.now()
        brought = self._brought()
        resumable = (kept.under_way or brought > 0) and kept.possible()
        if brought and resumable:
            self._spent = 0
        elif reason not in failover.FREE:
            self._spent += 1
        self._broken += reason is Reason.ENGINE_FAILED
        progress = failover.Progress(
            self._spent, self._events, self._deadline - now, self._broken, kept.resumes, resumable
        )
        step = failover.next(reason, progress, forwarder.budget)
        if step is failover.Next.STOP:
            raise failure from None
        if resumable:
            kept.go_on(reason, brought, now)
            self._last = None
        else:
            self._begin_anew()
        if reason in (Reason.INSTANCE_FULL, Reason.STARTING):
            return  # the router leaves it alone for a moment; others, or the queue, take the request
        facts = self._facts
        # Whoever failed it before it got on may be well again by now, and is needed in a small fleet.
        excluded = (frozenset() if brought and resumable else facts.excluded) | {lease.instance_id}
        counted = exact_prompt_tokens(error, failure) if reason is Reason.OUT_OF_RANGE and not resumable else 0
        if counted:
            self._facts = replace(facts, excluded=excluded, prompt_tokens=counted, counted=True)
        else:
            self._facts = replace(facts, excluded=excluded)
        forwarder.observe.retried(reason.value)
        if reason in failover.UNBUDGETED:
            return
        forwarder.budget.spend()
        if not self._retrying:
            self._retrying = True
            forwarder.budget.retrying += 1

    def _begin_anew(self) -> None:
        """Nothing has been sent, and what there is cannot be used."""
        self._kept.begin_anew()
        self._ahead.clear()
        self._last, self._ttft_s = None, 0.0

    def _brought(self) -> int:
        """Tokens of the attempt that is or was last under way."""
        return self._kept.brought(self._last.tokens if self._last is not None else 0)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _release(self, failure: BaseException | None) -> None:
        """Ends the attempt under way: its call, its lease, its span."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.end(failure)
            if self._spans is not None:
                told = (attempt.verified, attempt.ttft_s, attempt.tokens)
                self._spans.attempt_ended(word(failure), *told)

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
        forwarder.leave()  # first: whatever goes wrong below, nobody waits for a request that is over
        if self._attempt is not None:
            self._tried.append(Tried(self._attempt.lease.record, word(error)))
        self._release(error)
        usage = last.usage if last is not None else None
        prompt = usage.prompt_tokens if usage is not None else 0
        completion = usage.completion_tokens if usage is not None else self._kept.before + self._brought()
        if self._reserved:
            started = self._facts.prompt_tokens or self._carrier.router.estimate(self._facts)[0]
            used = prompt + completion if usage is not None else (started + completion if self._ttft_s else 0)
            forwarder.quota.settle(caller.tenant, self._reserved, used)
        endpoint = self._endpoint
        if endpoint is not None and isinstance(error, MeshError):
            error.instance_id, error.model_id = forwarder.showing.ids(endpoint)
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
            ttft_s=self._ttft_s,
            duration_s=self._carrier.now() - self._begun,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=usage.cached_tokens if usage is not None else 0,
            record=self._record,
            tried=tuple(self._tried),
            facts=self._facts if self._record is not None else None,
            resumes=self._kept.resumes,
            preempted=last.preempted if last is not None else 0,
            trace_id=self._context.trace_id if self._spans is None else self._spans.trace_id,
        )
        forwarder.observe.finished(report, error)
        if self._spans is not None:
            self._spans.ended(report, self._events > 0 and not self._context.collected)
