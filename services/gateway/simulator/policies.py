"""The names of DESIGN §9 and what stands behind each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from registry.endpoint import Endpoint
from services.gateway.routing.admission import Bounds
from services.gateway.simulator.ours import PATIENT, Ours
from services.gateway.simulator.peers import LeastRequest, Peer, PowerOfTwo, RoundRobin
from services.gateway.simulator.peers_prefix import CacheAware, KvOverlapCost, ScorerSum
from services.gateway.simulator.policy import Gateway, Policy
from services.gateway.simulator.trace import Trace


@dataclass(frozen=True, slots=True)
class PeerPolicy:
    """Builds a peer's gateways."""

    name: str
    build: type[Peer]
    report_s: float | None = None
    cache_events: Literal["never", "at_once", "with_report"] = "never"
    tick_s: float = 0.0

    def gateway(self, endpoints: Sequence[Endpoint], trace: Trace, now: float) -> Gateway:
        return self.build(self.name, endpoints, trace, now)


OURS: Final = ("infermesh", "infermesh_blind")
PEERS: Final[dict[str, PeerPolicy]] = {
    policy.name: policy
    for policy in (
        PeerPolicy("round_robin", RoundRobin),
        PeerPolicy("least_request", LeastRequest),
        PeerPolicy("power_of_two", PowerOfTwo),
        PeerPolicy("cache_aware", CacheAware),
        PeerPolicy("scorer_sum", ScorerSum, report_s=0.05),
        PeerPolicy("kv_overlap_cost", KvOverlapCost, cache_events="at_once"),
    )
}
NAMES: Final = (*OURS, *PEERS)


def policy(name: str, bounds: Bounds = PATIENT) -> Policy:
    """The policy of that name; `bounds` are those of our own queue.

    Raises:
        KeyError: there is none.
    """
    if name in OURS:
        return Ours(name, blind=name == "infermesh_blind", bounds=bounds)
    return PEERS[name]
