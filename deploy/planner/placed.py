"""What the planner says of each instance, and of the fleet as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deploy.fleet import Fleet, Instance
from deploy.planner.estimate import Estimate
from deploy.planner.gguf_split import Split


@dataclass(frozen=True, slots=True)
class Placed:
    """One instance. `rate`: requests/s that it takes under the objective (encoders: tokens/s); `commands`: host ->
    what has to be started there by hand, where the engine is not ours."""

    instance: Instance
    reasons: tuple[str, ...]
    estimate: Estimate
    rate: float = 0.0
    ttft_s: float | None = None
    tpot_ms: float | None = None
    split: Split | None = None
    commands: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tier:
    """The instances of a model and tier together against what is asked. Rates in requests/s (encoders: tokens/s)."""

    model: str
    tier: str
    wanted: float
    capacity: float
    ttft_s: float | None
    tpot_ms: float | None
    held: bool = True  # under the objective; else `capacity` is without it

    @property
    def headroom(self) -> float | None:
        """0.5: half as much again; below 0: short of it."""
        return self.capacity / self.wanted - 1 if self.wanted else None


@dataclass(frozen=True, slots=True)
class Plan:
    """`fleet`: the file completed. `short`: what is not served as asked, and what would change that. `claims`: what the
    file expects and the arithmetic does not give. `remarks`: what was assumed."""

    fleet: Fleet
    placed: tuple[Placed, ...]
    tiers: tuple[Tier, ...]
    short: tuple[str, ...]
    claims: tuple[str, ...]
    remarks: tuple[str, ...]
