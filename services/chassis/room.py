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
LAST_RANK = 1 << 30  # of who does not tell: it overtakes nobody
GUESSED_TPS = 2000.0  # prefill of a middling card, for requests that came without a gateway's estimate


class Outbox:
    """Grants on their way to one Link. `news` is set when there are some."""

    def __init__(self) -> None:
        self.frames: deque[wk.LinkResponse] = deque()
        self.news = asyncio.Event()


class Turn:
    """When a prompt may be in the engine. `mine`: now; `leave` is called when it is overtaken there."""

    def __init__(self, mine: bool) -> None:
        self.mine = asyncio.Event()
        self.leave: Callable[[], object] | None = None
        if mine:
            self.mine.set()

    def over(self) -> None:
        self.mine.clear()
        if self.leave is not None:
            self.leave()


class Room:
    """All that moves the arbiter goes through here, so that no grant is late. Without Links it bounds nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.arbiter = Arbiter()
        self._clock = clock
        self._tps = GUESSED_TPS
        self._load: Callable[[], wk.Load] | None = None
        self._links: dict[str, list[Outbox]] = {}
        self._turns: dict[int, Turn] = {}  # of those who may be overtaken, and of those whose turn it is not
        self._timer: asyncio.TimerHandle | None = None

    def fit(self, endpoint: Endpoint, load: Callable[[], wk.Load], *, preempts: bool = False) -> None:
        """What the instance is, once that is known, and where the engine speaks. `preempts`: the engine finds what it
        has computed of a prompt that is put aside in its cache."""
        capacity, speed = endpoint.capacity, endpoint.speed
        self.arbiter.resize(
            depth_s(endpoint), capacity.max_running, capacity.kv_tokens, step_s(endpoint), preempts=preempts
        )
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

    def arrive(self, relay: Relay | None, tokens: int, *, movable: bool = False) -> int:
        """A request's number here, for `turn`, `started` and `ended`. `tokens`: of its prompt, where no gateway tells;
        `movable`: it may be put aside.

        Raises:
            MeshError: INSTANCE_FULL, with the seconds of prompts queued: it did not ask, and the room is taken.
        """
        relay = relay or Relay()
        self._look()
        number, queued_s = self.arbiter.arrive(
            relay.gateway_id,
            self._clock(),
            relay.work_us or round(tokens / self._tps * US),
            relay.kv_tokens or tokens,
            relay.grant,
            relay.tenant,
            tokens=relay.uncached_tokens or max(min(tokens, 1), tokens - relay.cached_tokens),
            patience_us=relay.patience_us if movable else 0,
            rank=relay.rank if relay.HasField("rank") else LAST_RANK,
        )
        if not number:
            message = f"{queued_s:.3f} s of prompts are queued here, and the request was sent without a grant"
            raise MeshError(Reason.INSTANCE_FULL, message, retry_after_s=max(queued_s, 0.001))
        aside = self.arbiter.aside(number)
        if aside or (relay.patience_us and movable):
            self._turns[number] = Turn(not aside)
        if self._turns:
            self.settle()
        return number

    def turn(self, number: int) -> Turn | None:
        """None: it is its turn until its first token."""
        return self._turns.get(number)

    def computed(self, tokens: int) -> None:
        """The engine has ended a step that computed so many tokens of prompts."""
        if tokens:
            self.arbiter.computed(tokens, self._clock())
            if self.arbiter.waiting or self._turns:
                self.settle()

    def started(self, number: int) -> None:
        self._turns.pop(number, None)
        self.arbiter.started(number, self._clock())
        self.settle()

    def ended(self, number: int) -> None:
        self._turns.pop(number, None)
        self.arbiter.ended(number, self._clock())
        self.settle()

    def settle(self) -> None:
        """Hands out what room there is, and comes back when time alone will have made more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._links and not self._turns:
            return
        self._look()
        for gateway, ticket in self.arbiter.grants(self._clock()):
            frame = wk.LinkResponse(grant=wk.Grant(ticket=ticket, expires_ms=round(EXPIRY_S * 1000)))
            outbox = self._links[gateway][-1]  # the newest Link, if there are two
            outbox.frames.append(frame)
            outbox.news.set()
        self._order()
        now = self._clock()
        due = self.arbiter.due(now)
        if self.arbiter.waiting:
            due = min(due or now + POLL_S, now + POLL_S)
        if due is not None:
            with suppress(RuntimeError):  # no loop: a test without one
                self._timer = asyncio.get_running_loop().call_later(max(0.001, due - now), self.settle)

    def _order(self) -> None:
        """Those who are overtaken leave the engine, and come back."""
        aside, again = self.arbiter.orders(self._clock())
        for number in aside:
            if turn := self._turns.get(number):
                turn.over()
        for number in again:
            if turn := self._turns.get(number):
                turn.mine.set()

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
