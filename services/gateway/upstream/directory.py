"""From the registry's snapshots to the router's fleet, a Link for each instance, and what fronts may see of it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import grpc.aio
import structlog

from infermesh.errors import MeshError, Reason, from_rpc, invalid
from infermesh.v1 import worker_pb2 as wk
from registry.endpoint import Endpoint, Rejected, to_metadata, unusable_id
from registry.port import Registry, Snapshot
from services.gateway.routing.decision import Record
from services.gateway.routing.facts import Facts, Member
from services.gateway.routing.fleet import Instance
from services.gateway.routing.groups import GroupView
from services.gateway.routing.health import State
from services.gateway.routing.policy import Variants
from services.gateway.upstream.bans import BanBoard
from services.gateway.upstream.calls import InstanceView, ModelView
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.link import Link

KINDS = ("llm", "embedding", "rerank")
WATCH_PAUSE_S = 1.0
DRAIN_TIMEOUT_S = 5.0
log = structlog.get_logger("directory")
Life = tuple[str, int, str]  # id, incarnation, address


class Directory:
    def __init__(
        self,
        carrier: Carrier,
        gateway_id: str,
        weights: Mapping[str, float] | None = None,
        aliases: Mapping[str, Variants] | None = None,
        bans: BanBoard | None = None,
    ) -> None:
        self._carrier = carrier
        self.bans = bans or BanBoard(carrier)
        self._gateway_id = gateway_id
        self._weights = dict(weights or {})
        self.aliases = dict(aliases or {})
        self._links: dict[Life, tuple[Link, asyncio.Task[None]]] = {}
        self._snapshot = Snapshot(stale=True)
        self._created: dict[tuple[str, str], int] = {}
        self._still: dict[str, tuple[Endpoint, InstanceView]] = {}  # what an endpoint tells, written out once

    async def watch(self, registry: Registry) -> None:
        """Follows the registry for ever."""
        while True:
            try:
                async for snapshot in registry.watch(KINDS):
                    self.apply(snapshot)
            except Exception as error:
                log.error("the registry's watch broke; starting it again", error=str(error))
            await asyncio.sleep(WATCH_PAUSE_S)

    def apply(self, snapshot: Snapshot) -> None:
        """Takes in the whole directory. Unchanged lives keep channel, Link and statistics."""
        carrier = self._carrier
        if snapshot.stale and not self._snapshot.stale:
            log.warning("the registry is out of reach; going on with the last known instances")
        self._snapshot = snapshot
        members = [Member(entry.endpoint, entry.passing) for entry in snapshot.entries if entry.endpoint.kind in KINDS]
        carrier.do(carrier.router.update(members, carrier.now(), young=snapshot.young, stale=snapshot.stale))
        self.tend()
        carrier.touch()

    async def run(self) -> None:
        """Keeps Links in step with the fleet, whoever changed it."""
        while True:
            changed = self._carrier.changed
            self.tend()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):  # wait_for swallows a cancellation that comes with the change
                    await changed.wait()

    def tend(self) -> None:
        """One Link for each instance, none for those that have gone."""
        fleet = self._carrier.router.fleet
        wanted: dict[Life, Endpoint] = {
            (e.id, e.incarnation, e.address): e for e in (instance.endpoint for instance in fleet.instances.values())
        }
        for life in [life for life in self._links if life not in wanted]:
            self._links.pop(life)[1].cancel()
        now = int(time.time())
        for life, endpoint in wanted.items():
            self._created.setdefault((endpoint.kind, endpoint.model), now)
            if life not in self._links or self._links[life][1].done():
                link = Link(self._carrier, endpoint, self._gateway_id)
                self._links[life] = (link, asyncio.create_task(link.run(), name=f"link-{endpoint.id}"))

    async def close(self) -> None:
        tasks = [task for _, task in self._links.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._links.clear()

    # -- what fronts see --------------------------------------------------------------------------------------------

    @property
    def stale(self) -> bool:
        return self._snapshot.stale

    def models(self) -> list[ModelView]:
        found: dict[tuple[str, str], tuple[set[str], int]] = {}
        for instance in self._carrier.router.fleet.instances.values():
            endpoint = instance.endpoint
            aliases, context = found.get((endpoint.kind, endpoint.model), (set(), 0))
            found[endpoint.kind, endpoint.model] = (
                aliases | set(endpoint.aliases),
                max(context, endpoint.capacity.context_max),
            )
        views = [
            ModelView(model, kind, tuple(sorted(aliases)), context, self._created.get((kind, model), 0))
            for (kind, model), (aliases, context) in found.items()
        ]
        views += self._weighted(views)
        return sorted(views, key=lambda view: (view.id, view.kind))

    def _weighted(self, views: list[ModelView]) -> Iterator[ModelView]:
        """The weighted aliases behind which somebody serves; the tightest context range holds for all."""
        for name, variants in self.aliases.items():
            served = [view for view in views if view.id in {model for model, _ in variants}]
            if served:
                context = min((view.context_max for view in served if view.context_max), default=0)
                created = min(view.created for view in served)
                yield ModelView(name, served[0].kind, (), context, created, variants)

    def instances(self) -> list[InstanceView]:
        fleet = self._carrier.router.fleet.instances
        self._still = {id: still for id, still in self._still.items() if id in fleet}
        views = [self._view(instance) for instance in fleet.values()]
        known = {view.id for view in views}
        views += [_rejected(line) for line in self._snapshot.rejected if line.id not in known and line.kind in KINDS]
        return sorted(views, key=lambda view: view.id)

    def groups(self) -> Sequence[GroupView]:
        """Those that are scaled, and how many replicas each should have."""
        return self._carrier.router.groups()

    @property
    def healthy(self) -> int:
        instances = self._carrier.router.fleet.instances.values()
        working = (State.HEALTHY, State.PROBATION)
        return sum(instance.state in working or instance.spare for instance in instances)

    async def changed(self) -> None:
        """Until the fleet looks different."""
        await self._carrier.changed.wait()

    def explain(self, facts: Facts) -> Record:
        """Where the request would go now. Reserves nothing."""
        return self._carrier.router.explain(facts, self._carrier.now())

    async def drain(self, instance_id: str, grace_ms: int | None, reason: str, *, undo: bool = False) -> int:
        """Tells an instance to leave, or, while it still finishes its work, to stay. Returns how many requests run.

        Raises:
            MeshError: NOT_FOUND; or the instance's own refusal.
        """
        instance = self._carrier.router.fleet.instances.get(instance_id)
        if instance is None:
            raise MeshError(Reason.NOT_FOUND, f"no instance {instance_id!r}; `infermesh instances` lists them")
        line = self._carrier.channels.open(instance.endpoint)
        request = wk.DrainRequest(instance_id=instance_id, grace_ms=grace_ms, reason=reason, undo=undo)
        try:
            shown = self._carrier.credentials(instance.endpoint)
            reply = await line.worker.Drain(request, metadata=shown, timeout=DRAIN_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        return reply.running

    async def ban(self, instance_id: str, by: str, why: str, for_s: float | None, *, lifted: bool = False) -> None:
        """Takes an instance out of work on all gateways, or lifts that. It need not be registered now.

        Raises:
            MeshError: NOT_FOUND for a ban to lift that is not there; INVALID_ARGUMENT: no instance can have that id;
                FAILED_PRECONDITION: too many.
        """
        if not lifted and (fault := unusable_id(instance_id)):
            raise invalid("instance_id", fault)
        if lifted and instance_id not in self.bans.holding:
            raise MeshError(
                Reason.NOT_FOUND, f"{instance_id!r} is not banned; `infermesh instances` lists those who are"
            )
        await self.bans.put(instance_id, by, why, for_s, lifted=lifted)

    def _view(self, instance: Instance) -> InstanceView:
        """What it registered and how it is now. The first is slow to write out, and a fleet may be hundreds."""
        endpoint, report = instance.endpoint, instance.ledger.report
        still = self._still.get(endpoint.id)
        if still is None or still[0] is not endpoint:
            still = self._still[endpoint.id] = (endpoint, self._registered(endpoint))
        link = self._links.get((endpoint.id, endpoint.incarnation, endpoint.address))
        wrong = link[0].wrong if link else ""
        return dataclasses.replace(
            still[1],
            state="rejected" if wrong else instance.state.value,
            why=wrong or instance.why(),
            since_s=max(0.0, self._carrier.now() - instance.since),
            running=report.running if report else None,
            waiting=report.waiting if report else None,
            kv_used_ratio=report.kv_used_ratio if report else None,
            rejected_reason=wrong,
            in_flight=len(instance.ledger.entries),
        )

    def _registered(self, endpoint: Endpoint) -> InstanceView:
        return InstanceView(
            id=endpoint.id,
            kind=endpoint.kind,
            model=endpoint.model,
            address=endpoint.address,
            state="",
            tier=endpoint.tier,
            device=endpoint.hardware.device,
            speed={key: value for key, value in dataclasses.asdict(endpoint.speed).items() if value is not None},
            weight=endpoint.weight * self._weights.get(endpoint.id, 1.0),
            incarnation=endpoint.incarnation,
            aliases=endpoint.aliases,
            metadata=to_metadata(endpoint),
        )


def _rejected(line: Rejected) -> InstanceView:
    return InstanceView(
        id=line.id, kind=line.kind, model="", address=line.address, state="rejected", rejected_reason=line.reason
    )
