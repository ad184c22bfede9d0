"""The names of DESIGN §9 and what stands behind each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from services.gateway.routing.admission import Bounds
from services.gateway.simulator.fleet import Site
from services.gateway.simulator.ours import PATIENT, Ours
from services.gateway.simulator.peers import LeastRequest, Peer, PowerOfTwo, RoundRobin
from services.gateway.simulator.peers_prefix import CacheAware, KvOverlapCost, ScorerSum
from services.gateway.simulator.policy import Gateway, Policy


@dataclass(frozen=True, slots=True)
class PeerPolicy:
    """Builds a peer's gateways."""

    name: str
    build: type[Peer]
    report_s: float | None = None
    cache_events: Literal["never", "at_once", "with_report"] = "never"
    tick_s: float = 0.0
    asks: bool = False
    preempts: bool = False

    def gateway(self, site: Site, block_tokens: int, now: float) -> Gateway:
        return self.build(self.name, site, block_tokens, now)


FCFS: Final = "infermesh_fcfs"  # the same router before instances with --no-preempt
OURS: Final = ("infermesh", "infermesh_blind", FCFS)
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
# The order in which a search for capacity asks them: the first that sustains a rate ends the question.
STRONGEST_FIRST: Final = (
    "cache_aware",
    "kv_overlap_cost",
    "scorer_sum",
    "least_request",
    "power_of_two",
    "round_robin",
)


def policy(name: str, bounds: Bounds = PATIENT) -> Policy:
    """The policy of that name; `bounds` are those of our own queue.

    Raises:
        KeyError: there is none.
    """
    if name in OURS:
        return Ours(name, blind=name == "infermesh_blind", preempts=name != FCFS, bounds=bounds)
    return PEERS[name]
