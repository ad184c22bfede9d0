"""The arbiter of this instance's room, joined to the clock, to the engine's word and to the gateways' Links."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from infermesh.errors import MeshError, Reason
from infermesh.v1 import worker_pb2 as wk
from infermesh.v1.inference_pb2 import Relay
from registry.endpoint import Endpoint
from services.chassis.granting import EXPIRY_S, US, Arbiter, Want, depth_s, step_s

POLL_S = 0.1  # how often the engine is asked for KV room while requests wait for it
GUESSED_TPS = 2000.0  # prefill of a middling card, for requests that came without a gateway's estimate


class Outbox:
    """Grants on their way to one Link. `news` is set when there are some."""

    def __init__(self) -> None:
        self.frames: deque[wk.LinkResponse] = deque()
        self.news = asyncio.Event()


class Room:
    """All that moves the arbiter goes through here, so that no grant is late. Without Links it bounds nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.arbiter = Arbiter()
        self._clock = clock
        self._tps = GUESSED_TPS
        self._load: Callable[[], wk.Load] | None = None
        self._links: dict[str, list[Outbox]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def fit(self, endpoint: Endpoint, load: Callable[[], wk.Load]) -> None:
        """What the instance is, once that is known, and where the engine speaks."""
        capacity, speed = endpoint.capacity, endpoint.speed
        self.arbiter.resize(depth_s(endpoint), capacity.max_running, capacity.kv_tokens, step_s(endpoint))
        self._tps = (speed.prefill_tps if endpoint.kind == "llm" else speed.tokens_per_s) or GUESSED_TPS
        self._load = load

    # -- gateways ---------------------------------------------------------------------------------------------------

    @contextmanager
    def linked(self, gateway: str) -> Iterator[Outbox]:
        """While the Link of a gateway that asks stands."""
        outbox = Outbox()
        self._links.setdefault(gateway, []).append(outbox)
        self.arbiter.joined(gateway)
        try:
            yield outbox
        finally:
            self.arbiter.left(gateway)
            self._links[gateway].remove(outbox)
            if not self._links[gateway]:
                del self._links[gateway]
            self.settle()

    def hear(self, gateway: str, frame: wk.LinkRequest) -> None:
        """A frame of a gateway's Link. Those of later versions are ignored."""
        which = frame.WhichOneof("frame")
        if which == "want":
            self.arbiter.want(gateway, want_of(frame.want), self._clock())
        elif which == "decline":
            self.arbiter.decline(gateway, frame.decline.ticket)
        else:
            return
        self.settle()

    def tell(self, gateway: str, load: wk.Load) -> None:
        """Adds to a load frame what the gateway cannot know of the others."""
        others = self.arbiter.others(gateway, self._clock())
        load.gateways, load.foreign_work_us = others.gateways, others.work_us
        load.foreign_waiting = others.waiting
        load.tenants_beyond.extend(sorted(others.beyond))
        load.foreign_line_ms.extend(others.line_ms)

    # -- requests ---------------------------------------------------------------------------------------------------

    def arrive(self, relay: Relay | None, tokens: int) -> int:
        """A request's number here, for `started` and `ended`.

        Raises:
            MeshError: INSTANCE_FULL, with the seconds of prompts queued: it did not ask, and the room is taken.
        """
        gateway, work_us, kv_tokens, grant, tenant = "", 0, tokens, 0, ""
        if relay is not None:
            gateway, work_us, grant, tenant = relay.gateway_id, relay.work_us, relay.grant, relay.tenant
            kv_tokens = relay.kv_tokens or tokens
        self._look()
        now = self._clock()
        number, queued_s = self.arbiter.arrive(
            gateway, now, work_us or round(tokens / self._tps * US), kv_tokens, grant, tenant
        )
        if not number:
            message = f"{queued_s:.3f} s of prompts are queued here, and the request was sent without a grant"
            raise MeshError(Reason.INSTANCE_FULL, message, retry_after_s=max(queued_s, 0.001))
        return number

    def started(self, number: int) -> None:
        self.arbiter.started(number, self._clock())
        self.settle()

    def ended(self, number: int) -> None:
        self.arbiter.ended(number, self._clock())
        self.settle()

    def settle(self) -> None:
        """Hands out what room there is, and comes back when time alone will have made more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._links:
            return
        self._look()
        for gateway, ticket in self.arbiter.grants(self._clock()):
            frame = wk.LinkResponse(grant=wk.Grant(ticket=ticket, expires_ms=round(EXPIRY_S * 1000)))
            outbox = self._links[gateway][-1]  # the newest Link, if there are two
            outbox.frames.append(frame)
            outbox.news.set()
        now = self._clock()
        due = self.arbiter.due(now)
        if self.arbiter.waiting:
            due = min(due or now + POLL_S, now + POLL_S)
        if due is not None:
            with suppress(RuntimeError):  # no loop: a test without one
                self._timer = asyncio.get_running_loop().call_later(max(0.001, due - now), self.settle)

    def _look(self) -> None:
        if self._load is not None:
            load = self._load()
            self.arbiter.engine(
                load.kv_used_ratio if load.HasField("kv_used_ratio") else None,
                load.running if load.HasField("running") else None,
            )


def want_of(frame: wk.Want) -> Want:
    return Want(
        ticket=frame.ticket,
        work_us=frame.work_us,
        kv_tokens=frame.kv_tokens,
        spare_tokens=frame.spare_tokens,
        rank=frame.rank,
        priority=frame.priority,
        bias_us=frame.bias_us,
        age_s=frame.age_ms / 1000,
        line_ms=tuple(frame.line_ms),
        waiting=frame.waiting,
        late=frame.late,
        tenant=frame.tenant,
        service_us=frame.service_us,
    )
