"""One instance's door: its engine, and the arbiter that lets gateways in, joined as in a real instance's chassis."""

from __future__ import annotations

from dataclasses import replace

from infermesh.errors import Reason
from registry.endpoint import Endpoint
from services.chassis.granting import Arbiter, Grant, Want, depth_s, step_s
from services.gateway.routing.facts import LoadReport
from services.gateway.simulator.encoder import EncoderEngine
from services.gateway.simulator.engine import LlmEngine
from services.gateway.simulator.job import Job


class Door:
    """`asking`: how many gateways ask before they send; 0 where the policy knows nothing of grants. `preempts`: shorter
    prompts overtake longer ones."""

    def __init__(self, endpoint: Endpoint, engine: LlmEngine | EncoderEngine, asking: int, preempts: bool) -> None:
        self.engine = engine
        self.versions = 0  # of the arbiter's timer
        self._arbiter: Arbiter | None = None
        self._heard = 0  # prompt tokens that the engine has computed
        self._prompts: dict[int, Job] = {}  # by number, without a first token
        if asking:
            capacity = endpoint.capacity
            bounds = (depth_s(endpoint), capacity.max_running, capacity.kv_tokens, step_s(endpoint))
            self._arbiter = Arbiter(*bounds, preempts=preempts and isinstance(engine, LlmEngine))
            for gateway in range(asking):
                self._arbiter.joined(str(gateway))

    def refuses(self, job: Job, now: float) -> tuple[Reason, float] | None:
        """Why it will not begin, and the seconds of prompts it has queued; None: it is in."""
        if self.engine.refuses(job):
            if self._arbiter is not None and job.lease is not None and job.lease.grant:
                self._arbiter.decline(str(job.gateway), job.lease.grant)
            return Reason.OUT_OF_RANGE, 0.0
        if self._arbiter is None or job.lease is None:
            return None
        lease = job.lease
        self._look(now)
        number, queued_s = self._arbiter.arrive(
            str(job.gateway),
            now,
            lease.work_us,
            lease.kv_tokens,
            lease.grant,
            job.request.tenant,
            tokens=lease.record.prompt_tokens - lease.record.cached_tokens,
            patience_us=lease.patience_us,
            rank=lease.rank,
        )
        if not number:
            return Reason.INSTANCE_FULL, queued_s
        job.number = number
        self._prompts[number] = job
        return None

    def moved(self, started: list[Job], done: list[Job], now: float) -> None:
        """Who got the first token and who the last."""
        if self._arbiter is None:
            return
        self._look(now)
        for job in started:
            self._arbiter.started(job.number, now)
            del self._prompts[job.number]
        for job in done:
            self._arbiter.ended(job.number, now)

    def want(self, gateway: int, want: Want, now: float) -> None:
        if self._arbiter is not None:
            self._arbiter.want(str(gateway), want, now)

    def decline(self, gateway: int, ticket: int) -> None:
        if self._arbiter is not None:
            self._arbiter.decline(str(gateway), ticket)

    def grants(self, now: float) -> list[Grant]:
        if self._arbiter is None:
            return []
        self._look(now)
        return self._arbiter.grants(now)

    def order(self, now: float) -> bool:
        """Prompts that are overtaken leave the engine, and come back. True where its present segment ends otherwise."""
        if self._arbiter is None or not isinstance(self.engine, LlmEngine):
            return False
        aside, again = self._arbiter.orders(now)
        changed = False
        for number in aside:
            changed |= self.engine.put_aside(self._prompts[number], now)
        for number in again:
            changed |= self.engine.add(self._prompts[number], now)
        return changed

    def due(self, now: float) -> float | None:
        return None if self._arbiter is None else self._arbiter.due(now)

    def load(self, gateway: int, now: float) -> LoadReport:
        load = self.engine.load(gateway, now)
        if self._arbiter is None:
            return load
        others = self._arbiter.others(str(gateway), now)
        if isinstance(self.engine, LlmEngine):  # what gateways think of the prompts, as in a real instance
            own, queued = self._arbiter.queued_tokens(str(gateway)), self._arbiter.queued_tokens()
            load = replace(load, own_queued_tokens=own, queued_tokens=queued)
        return replace(
            load,
            gateways=others.gateways,
            foreign_work_us=others.work_us,
            foreign_line_ms=others.line_ms,
            foreign_waiting=others.waiting,
            tenants_beyond=others.beyond,
        )

    def _look(self, now: float) -> None:
        if self._arbiter is not None and isinstance(self.engine, LlmEngine):
            cache = self.engine.cache
            computed, ended = self.engine.computed(now)
            if computed > self._heard:
                self._arbiter.computed(computed - self._heard, ended)
            self._heard = computed
            self._arbiter.engine(cache.in_use / cache.capacity, self.engine.running)
