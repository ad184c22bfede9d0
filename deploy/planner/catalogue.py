"""Cards, and which engines and dtypes run on their generation. Figures and their sources are in catalogue.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

import yaml

PCIE_GBS = 12.0
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What is reached of a card's peak, 0 .. 1."""

    prefill: float
    decode: float
    kv: float
    encoder: float


@dataclass(frozen=True, slots=True)
class Support:
    """What one engine can load; `note`: what has to be known to do it."""

    dtypes: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """All cards of one compute capability."""

    key: str  # "8.0", "cpu", "other"
    name: str
    engines: Mapping[str, Support]
    kv_dtypes: tuple[str, ...]
    efficiency: Efficiency
    source: str

    @property
    def sm(self) -> str:
        return f"sm_{self.key.replace('.', '')}" if self.key[0].isdigit() else self.key


@dataclass(frozen=True, slots=True)
class Card:
    """One card; a CPU's rates are those of one core, its memory is the node's."""

    name: str
    memory_mib: float
    bandwidth_gbs: float
    tflops: Mapping[str, float]
    generation: Generation
    nvlink_gbs: float = 0.0
    pcie_gbs: float = PCIE_GBS
    cpu: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_mib * MIB

    @property
    def bf16(self) -> bool:
        return "bf16" in self.tflops

    def rate(self, dtype: str) -> tuple[str, float]:
        """(dtype that is multiplied, its TFLOPS) for weights of a dtype: int4 and, without a rate of its own, fp8 and
        int8 weights are widened to 16 bits before they are multiplied."""
        wide = "bf16" if self.bf16 else "fp16"
        wanted = {"int4": wide, "bf16": wide}.get(dtype, dtype)
        if wanted == "fp16" and self.tflops.get("fp16", 0.0) < self.tflops["fp32"] / 2:  # P40: 1/64
            wanted = "int8" if dtype == "int4" else "fp32"
        if wanted not in self.tflops:
            wanted = wide if wide in self.tflops else "fp32"
        return wanted, self.tflops[wanted]


@dataclass(frozen=True, slots=True)
class Catalogue:
    cards: Mapping[str, Card]
    generations: Mapping[str, Generation]

    def fault(self, name: str) -> str:
        """Why there is no such card, and what to do; empty if there is one."""
        if name in self.cards:
            return ""
        close = difflib.get_close_matches(name, self.cards, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        return (
            f"{name!r} is not in the hardware catalogue: {hint}It has {', '.join(self.cards)}; "
            "or describe the card under `devices:` (memory_mib, bandwidth_gbs, tflops, compute_capability)"
        )

    def with_devices(self, devices: Mapping[str, Mapping[str, Any]]) -> tuple[Catalogue, list[tuple[str, str]]]:
        """The catalogue with a fleet file's additions and corrections, and (path, fault) of those that say too
        little."""
        cards, faults = dict(self.cards), []
        for name, told in devices.items():
            said = {key: value for key, value in told.items() if value not in (None, {}, ())}
            known = cards.get(name)
            if known is None:
                needed = ("memory_mib", "bandwidth_gbs", "tflops")
                missing = [key for key in needed if key not in said]
                if missing:
                    faults.append((f"devices.{name}", f"is a new card: {', '.join(missing)} must be told too"))
                    continue
            key = str(said.get("compute_capability", known.generation.key if known else "other"))
            generation = self.generations.get(key) or self._nearest(key)
            if "engines" in said:
                generation = _limited(generation, said["engines"])
            figures = {key: float(value) for key, value in said.items() if key.endswith(("_mib", "_gbs"))}
            sources = {key: "devices: of the fleet file" for key in said}
            if known:
                rates = {**known.tflops, **said.get("tflops", {})}
                sources = {**known.sources, **sources}
                cards[name] = replace(known, generation=generation, tflops=rates, sources=sources, **figures)  # type: ignore[arg-type]
                continue
            rates = dict(said["tflops"])
            rates.setdefault("fp32", min(rates.values()))
            cards[name] = Card(name=name, tflops=rates, generation=generation, sources=sources, **figures)  # type: ignore[arg-type]
        return replace(self, cards=cards), faults

    def _nearest(self, key: str) -> Generation:
        """The newest generation that is not newer: 8.7 is read as 8.6, 10.0 as 9.0, 5.2 as `other`."""
        older = [known for known in self.generations if known[0].isdigit() and float(known) <= float(key)]
        return self.generations[max(older, key=float) if older else "other"]


def _limited(generation: Generation, engines: tuple[str, ...]) -> Generation:
    """The generation with the engines that the fleet file allows; one that it lacks takes 16 bits."""
    kept = {name: generation.engines.get(name) or Support(("bf16", "fp16")) for name in engines}
    return replace(generation, engines=kept)


def parse_catalogue(text: str) -> Catalogue:
    """Reads catalogue.yaml.

    Raises:
        KeyError, TypeError: it is not in the form that its head describes.
    """
    raw = yaml.safe_load(text)
    generations = {}
    for key, told in raw["generations"].items():
        engines = {name: Support(tuple(one["dtypes"]), one.get("note", "")) for name, one in told["engines"].items()}
        generations[key] = Generation(
            key,
            told["name"],
            engines,
            tuple(told["kv_dtypes"]),
            Efficiency(**told["efficiency"]),
            told["source"],
        )
    cards = {}
    for name, told in raw["cards"].items():
        cpu = bool(told.get("cpu"))
        cards[name] = Card(
            name=name,
            memory_mib=float(told.get("memory_mib", 0.0)),
            bandwidth_gbs=float(told["bandwidth_gbs"]),
            tflops=told["tflops"],
            generation=generations["cpu" if cpu else told["compute_capability"]],
            nvlink_gbs=float(told.get("nvlink_gbs", 0.0)),
            pcie_gbs=float(told.get("pcie_gbs", PCIE_GBS)),
            cpu=cpu,
            sources=told["sources"],
        )
    return Catalogue(cards, generations)


def shipped() -> Catalogue:
    """The catalogue that comes with the package."""
    return parse_catalogue((files(__package__) / "catalogue.yaml").read_text(encoding="utf-8"))
