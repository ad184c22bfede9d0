"""One request on its way through the simulated mesh: what the gateway, the wire and the engine each know of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.gateway.routing.decision import Lease
from services.gateway.routing.facts import Facts
from services.gateway.simulator.trace import Request


@dataclass(slots=True, eq=False)
class Job:
    """`facts` is what its gateway knows; the rest is the truth, which no policy sees. Times are virtual seconds."""

    request: Request
    gateway: int
    facts: Facts
    lease: Lease | None = None
    refusals: int = 0  # times an instance would not begin
    instance: str = ""  # that runs it, or ran it
    degraded: bool = False
    shed: str = ""  # why nobody answered it
    # In the engine.
    number: int = 0  # in its instance's arbiter
    sent: float = 0.0
    output: int = 0  # tokens it will make here: the trace's, cut at the instance's range
    cached: int = 0  # prompt tokens found in the prefix cache
    moved: bool = False  # it was put aside, for others who overtook it
    left: int = 0  # prompt tokens still to be computed
    computed: int = 0  # prompt tokens in the KV cache
    finish_tick: int = 0
    # As the gateway saw it.
    first: float = -1.0
    done: float = -1.0
    blocks: tuple[int, ...] = field(default=())
