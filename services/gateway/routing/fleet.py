"""What the router holds of each instance, and who serves which model."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from registry.endpoint import Endpoint
from services.chassis.fairness import MOST_KEPT, NOTHING, SHALLOW, Size
from services.chassis.granting import Want
from services.gateway.routing.health import Link, State, Voices
from services.gateway.routing.ledger import US, Ledger
from services.gateway.routing.line import Line
from services.gateway.routing.pace import Pace
from services.gateway.routing.pulse import Vital
from services.gateway.routing.rates import Rates
from services.gateway.routing.reserve import Reserve
from services.gateway.routing.tally import Tally

MOST_GATEWAYS = 16
NOBODY = Want(0, 0)


@dataclass(slots=True)
class Instance:
    """One life of one instance. `full_until`: it refused for want of room, and is left alone until then. `line`: who
    waits in this gateway and would go here as things stand."""

    endpoint: Endpoint
    rates: Rates
    voices: Voices = field(default_factory=Voices)
    ledger: Ledger = field(default_factory=Ledger)
    vital: Vital = field(default_factory=Vital)
    tally: Tally = field(default_factory=Tally)
    pace: Pace = field(default_factory=Pace)
    line: Line = field(default_factory=Line)
    reserve: Reserve = field(default_factory=Reserve)
    state: State = State.STARTING
    full_until: float = 0.0
    barred: bool = False  # its class of cards is ahead of its share of the split
    spare: bool = False  # serves though not healthy: too few are
    share: float = 1.0  # of its weight, while it comes back or comes new
    ramp_from: float | None = None  # when that began
    since: float = 0.0  # of its state
    settled: State = State.STARTING  # the one that those who wait were last placed by
    beats: bool = False  # it promised a frame a second at least
    # Seconds awake (pulse.py): last frame; when the engine's steps last advanced, None = it counts none; last probe.
    heard: float = 0.0
    stepped: float | None = None
    asked: float = 0.0
    grants: bool = False  # its hello says that it arbitrates
    closed: bool = False  # it refused what it was not asked for; until it says more
    told: Want = NOBODY  # of who waits here, last, at `told_at`
    told_at: float = 0.0

    @property
    def id(self) -> str:
        return self.endpoint.id

    @property
    def is_linked(self) -> bool:
        return self.voices.link is Link.UP

    def why(self) -> str:
        """What an operator should know of its state; empty where the state says it all."""
        said = self.voices.reason()
        if not said and self.share < 1:
            return f"slow start, at {self.share:.0%} of its weight"
        if not said and self.pace.share < 1:
            return f"slower than it should be, at {self.pace.share:.0%} of its weight"
        return said

    @property
    def shared(self) -> bool:
        """Several gateways send here, and it arbitrates between them: who cannot begin at once is announced, and goes
        when it grants."""
        report = self.ledger.report
        return self.grants and report is not None and report.gateways > 1

    @property
    def contended(self) -> bool:
        """It is shared, and somebody waits for it: it keeps its queue of prompts at its depth."""
        return self.shared and (self.closed or self.line.all_count > 0)

    def has_slot(self, now: float, tenant: str = "") -> bool:
        """`max_running` is the gateway's cap too; an unknown one caps nothing. `tenant`: whose request would take it;
        what others used lately is not its."""
        if now < self.full_until or self.barred:
            return False
        cap, ledger = self.endpoint.capacity.max_running, self.ledger
        if self.state is State.PROBATION and ledger.entries and not self.spare:
            return False
        free = cap - ledger.own_slots - ledger.foreign_running
        if not cap or free > -(-cap // MOST_KEPT) or not tenant:
            return not cap or free > 0
        return free > self.kept(now, tenant).slots

    @property
    def whole(self) -> Size:
        capacity = self.endpoint.capacity
        return Size(capacity.max_running, capacity.kv_tokens)

    def beyond(self, now: float) -> Set[str]:
        """Tenants that have more here than others, who go first. Where several gateways send, the instance knows."""
        report = self.ledger.report
        if report is not None and self.shared:
            return report.tenants_beyond
        return self.ledger.holdings.beyond(self.whole, now)

    def kept(self, now: float, tenant: str) -> Size:
        """What stays free beside this tenant's next request."""
        return self.ledger.holdings.kept(tenant, self.whole, now) if tenant in self.beyond(now) else NOTHING

    def crowd(self) -> float:
        """How many times this gateway's part of the instance's requests all of them are: 1 where no other gateway sends
        here. What waits in the others cannot be seen, and is taken to be in the same proportion, unless it tells."""
        ledger = self.ledger
        if self.shared:
            return 1.0
        foreign = ledger.foreign_running
        return min(MOST_GATEWAYS, 1.0 + foreign / (ledger.own_slots + 1)) if foreign else 1.0

    def is_open(self, wait: float, crowd: float, now: float, tenant: str = "") -> bool:
        """Whether its queue of prompts, `wait` seconds, is short enough for more of ours: several gateways fill it
        together, each its part. `tenant`: whose request would join it."""
        depth = self.rates.depth_s
        if tenant and wait > depth / SHALLOW and tenant in self.beyond(now):
            return False
        if self.grants and self.contended:
            return False  # it grants to the best of those who wait
        return wait <= depth and (crowd == 1.0 or self.ledger.own_work * crowd <= depth * US)

    def busy_s(self) -> float:
        """Seconds of prompts queued there and in this gateway for it; coarse and cheap."""
        ledger = self.ledger
        return (ledger.own_work + ledger.foreign_work) / US + self.line.all_s


@dataclass(slots=True)
class Fleet:
    """`pools`: (kind, model id or alias) -> its instances, sorted by id. `leaving`: lives that are over, until what
    runs there has ended."""

    instances: dict[str, Instance] = field(default_factory=dict)
    leaving: dict[tuple[str, int], Instance] = field(default_factory=dict)
    pools: dict[tuple[str, str], list[Instance]] = field(default_factory=dict)

    def index(self) -> None:
        pools: dict[tuple[str, str], list[Instance]] = {}
        for id in sorted(self.instances):
            instance = self.instances[id]
            endpoint = instance.endpoint
            for name in dict.fromkeys((endpoint.model, *endpoint.aliases)):
                pools.setdefault((endpoint.kind, name), []).append(instance)
        self.pools = pools

    def pools_of(self, instance: Instance) -> list[list[Instance]]:
        endpoint = instance.endpoint
        names = dict.fromkeys((endpoint.model, *endpoint.aliases))
        return [pool for name in names if (pool := self.pools.get((endpoint.kind, name)))]

    def life(self, id: str, incarnation: int) -> Instance | None:
        instance = self.instances.get(id)
        if instance is not None and instance.endpoint.incarnation == incarnation:
            return instance
        return self.leaving.get((id, incarnation))
