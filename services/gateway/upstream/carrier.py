"""Carries the router's effects out: wakes those who wait, cuts calls, closes channels, sends probes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2

from infermesh.v1 import worker_pb2 as wk
from infermesh.v1.inference_pb2 import Relay
from registry.endpoint import Endpoint
from services.chassis.granting import Want
from services.chassis.passes import Passes
from services.gateway.observe import Observe
from services.gateway.routing.decision import Abandon, Close, Decline, Dispatch, Effect, Eject, Lease, Probe, Refuse
from services.gateway.routing.facts import End, Outcome
from services.gateway.routing.health import Link
from services.gateway.routing.router import Router
from services.gateway.upstream.channels import Channels
from services.gateway.upstream.failures import we_were_cancelled

TICK_S = 0.05
PROBE_TIMEOUT_S = 1.0
AWAKE_PART = 0.7  # of a probe's time, for its deadline to say something
log = structlog.get_logger("mesh")


class Carrier:
    """Everything that moves the router goes through here, so that no effect is lost."""

    def __init__(
        self,
        router: Router,
        channels: Channels,
        observe: Observe,
        clock: Callable[[], float],
        passes: Passes | None = None,
    ) -> None:
        self.router = router
        self.channels = channels
        self.now = clock
        self._passes = passes
        self.changed = asyncio.Event()  # replaced at each change of the fleet
        self._observe = observe
        self._waiters: dict[int, asyncio.Future[Dispatch | Refuse]] = {}
        self._calls: dict[int, tuple[str, Any]] = {}  # by a lease's seq: the instance, the grpc call
        self._probes: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._said: dict[str, asyncio.Queue[wk.LinkRequest]] = {}  # by instance
        self._effects: deque[Effect] = deque()
        self._doing = False

    def credentials(self, endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
        """What this gateway shows to an instance."""
        return (("authorization", self._passes.show(endpoint.address)),) if self._passes is not None else ()

    def lent(self, endpoint: Endpoint, relay: Relay) -> dict[str, str]:
        """What a caller shows to an instance that he calls himself, for the one attempt that `relay` tells of."""
        if self._passes is None:
            return {}
        return {"authorization": self._passes.lend(endpoint.address, relay.SerializeToString())}

    def do(self, effects: Iterable[Effect]) -> None:
        """One after the other, also what they set in motion themselves: a lease for a caller who has gone passes to
        the next one, and a thousand may have gone at once."""
        self._effects.extend(effects)
        if self._doing:
            return
        self._doing = True
        try:
            while self._effects:
                self._do(self._effects.popleft())
        finally:
            self._doing = False
        self.ask()

    def _do(self, effect: Effect) -> None:
        if isinstance(effect, Dispatch | Refuse):
            self._wake(effect)
        elif isinstance(effect, Eject):
            log.warning("instance takes no more work", instance=effect.instance_id, why=effect.why, cause=effect.cause)
            self._observe.metrics.ejected(effect.instance_id, effect.cause)
            self.touch()
        elif isinstance(effect, Probe):
            self._probe(effect.instance_id)
        elif isinstance(effect, Abandon):
            self._abandon(effect)
        elif isinstance(effect, Decline):
            self._say(effect.instance_id, wk.LinkRequest(decline=wk.Decline(ticket=effect.ticket)))
        elif isinstance(effect, Close):
            self.channels.close(effect.instance_id, effect.incarnation)
            self.touch()

    def ask(self) -> None:
        """Tells instances that arbitrate who waits here for them, where that has changed."""
        for ask in self.router.asks(self.now()):
            self._say(ask.instance_id, wk.LinkRequest(want=_want_frame(ask.want)))

    @contextmanager
    def speaking(self, id: str) -> Iterator[asyncio.Queue[wk.LinkRequest]]:
        """What is to be said on an instance's Link, while it stands."""
        frames: asyncio.Queue[wk.LinkRequest] = asyncio.Queue()
        self._said[id] = frames
        try:
            yield frames
        finally:
            if self._said.get(id) is frames:
                del self._said[id]

    def _say(self, id: str, frame: wk.LinkRequest) -> None:
        frames = self._said.get(id)
        if frames is not None:
            frames.put_nowait(frame)

    def touch(self) -> None:
        """The fleet looks different now."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def release(self, lease: Lease, outcome: Outcome) -> None:
        effects = self.router.release(lease, outcome, self.now())
        if effects:
            self.do(effects)

    def greeted(self, lease: Lease) -> bool:
        """Whether the Link to this life is up: its hello said the registered id."""
        life = self.router.fleet.life(lease.instance_id, lease.incarnation)
        return life is not None and life.voices.link is Link.UP

    def attach(self, lease: Lease, call: Any) -> None:
        """The grpc call of a lease, so that the router can have it cut; until `detach`."""
        self._calls[lease.seq] = (lease.instance_id, call)

    def detach(self, lease: Lease) -> None:
        self._calls.pop(lease.seq, None)

    def _abandon(self, effect: Abandon) -> None:
        """Whoever reads the call gets a CancelledError that is not his own: INSTANCE_LOST."""
        instance, call = self._calls.pop(effect.seq, ("", None))
        if call is not None:
            log.warning("call abandoned", instance=instance, seq=effect.seq, why=effect.why)
            self._observe.metrics.abandoned(instance)
            call.cancel()

    async def wait(self, ticket: int) -> Dispatch | Refuse:
        """Until the router answers for the ticket. Cancelling gives place and, if it just came, lease back."""
        waiter: asyncio.Future[Dispatch | Refuse] = asyncio.get_running_loop().create_future()
        self._waiters[ticket] = waiter
        self.ask()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and isinstance(answer := waiter.result(), Dispatch):
                self.release(answer.lease, Outcome(End.CANCELLED))
            self.do(self.router.cancel(ticket, self.now()))
            raise
        finally:
            del self._waiters[ticket]

    async def run(self) -> None:
        """The router's clock. A tick takes a few dozen of those whose time is over, so that many hold nobody up."""
        while True:
            await asyncio.sleep(TICK_S)
            while effects := self.router.tick(self.now()):
                self.do(effects)
                await asyncio.sleep(0)
            self.ask()

    def _wake(self, effect: Dispatch | Refuse) -> None:
        waiter = self._waiters.get(effect.ticket)
        if waiter is not None and not waiter.done():
            waiter.set_result(effect)
        elif isinstance(effect, Dispatch):  # its caller has just gone
            self.release(effect.lease, Outcome(End.CANCELLED))

    def _probe(self, id: str) -> None:
        """One at a time for each life."""
        instance = self.router.fleet.instances.get(id)
        if instance is None or (life := (id, instance.endpoint.incarnation)) in self._probes:
            return
        task = self._probes[life] = asyncio.create_task(self._ask(instance.endpoint), name=f"probe-{id}")
        task.add_done_callback(lambda _: self._probes.pop(life))

    async def _ask(self, endpoint: Endpoint) -> None:
        well = None
        # Whoever dials a life that is over opens connections that nobody will close.
        while well is None and self.router.fleet.life(endpoint.id, endpoint.incarnation) is not None:
            well = await self._check(endpoint)
        if well is not None:
            self.do(self.router.probed(endpoint.id, endpoint.incarnation, well, self.now()))
            self.touch()

    async def _check(self, endpoint: Endpoint) -> bool | None:
        """Whether its health says SERVING; None where nobody can tell: the deadline passed while our own loop stood."""
        line = self.channels.open(endpoint)
        asked = self.router.awake_s
        try:
            reply = await line.health.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
        except (Exception, asyncio.CancelledError) as error:
            if we_were_cancelled(error):
                raise
            code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
            late = code is grpc.StatusCode.DEADLINE_EXCEEDED
            if late and self.router.awake_s - asked < AWAKE_PART * PROBE_TIMEOUT_S:
                return None
            log.info("probe failed", instance=endpoint.id, error=code.name if code else type(error).__name__)
            return False


def _want_frame(want: Want) -> wk.Want:
    return wk.Want(
        ticket=want.ticket,
        work_us=max(0, want.work_us),
        kv_tokens=max(0, want.kv_tokens),
        age_ms=min(max(0, round(want.age_s * 1000)), 2**32 - 1),
        priority=want.priority,
        rank=want.rank,
        bias_us=want.bias_us,
        spare_tokens=want.spare_tokens,
        line_ms=[min(max(0, ms), 2**32 - 1) for ms in want.line_ms],
        waiting=want.waiting,
        late=want.late,
        tenant=want.tenant,
        service_us=max(0, want.service_us),
    )
