"""Ways to run one LLM on one host: sizes of tensor and pipeline parallelism with what each would give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deploy.planner.catalogue import GIB, Card
from deploy.planner.demand import Demand, Load, load, most
from deploy.planner.hosts import Host
from deploy.planner.memory import Memory, Setup, memory
from deploy.planner.roofline import LlmSpeed, llm_speed
from deploy.planner.shape import Shape, tp_fault

ENGINES = ("vllm", "openai-http")  # the first that a card's generation runs
QUALITY = {
    "fp8": "fp8 weights: about 1 % on common benchmarks",
    "int8": "int8 weights (W8A8): 1 to 2 %",
    "int4": "int4 weights: 2 to 5 %, more for small models and long reasoning",
    "kv fp8": "fp8 KV cache: up to 2 % (seed 001_9fb6dd293e332b2a.txt)",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """One way. `count` instances of it fill the host; `rate`: requests/s that one of them takes under the objective."""

    setup: Setup
    count: int
    memory: Memory
    speed: LlmSpeed
    rate: float

    @property
    def total(self) -> float:
        return self.rate * self.count

    @property
    def text(self) -> str:
        split = f"TP{self.setup.tp}" + (f"×PP{self.setup.pp}" if self.setup.pp > 1 else "")
        return f"{split} × {self.count}" + ("" if self.setup.kv_dtype == "fp16" else f", KV in {self.setup.kv_dtype}")

    def load(self, demand: Demand, rate: float) -> Load | None:
        return load(self.speed, demand, rate)


def engine_of(shape: Shape, card: Card) -> str:
    """The engine for an LLM on this card; empty if there is none."""
    if shape.gguf:
        return "openai-http" if "openai-http" in card.generation.engines else ""
    return next((engine for engine in ENGINES if engine in card.generation.engines), "")


def dtype_on(card: Card, engine: str, dtype: str) -> tuple[str, str]:
    """(the dtype to load weights of `dtype` in, why it differs); an empty dtype: it cannot be loaded, and why."""
    allowed = card.generation.engines[engine].dtypes
    if dtype in allowed:
        return dtype, ""
    if dtype == "bf16" and "fp16" in allowed:
        return (
            "fp16",
            f"no bf16 on {card.generation.sm}: fp16, whose range some models overflow; run `infermesh verify`",
        )
    why = f"{dtype} weights need compute capability 8.9" if dtype == "fp8" else f"{engine} does not load {dtype}"
    return "", f"{card.name} ({card.generation.sm}): {why} there; it loads {', '.join(allowed)}"


def layouts(
    shape: Shape, dtype: str, host: Host, demand: Demand, kv_dtypes: tuple[str, ...], context: int = 0
) -> list[Layout]:
    """Every way that holds at least one request, the smallest instances first. `context`: tokens that one request must
    have room for, where that is more than the demand's mean."""
    engine = engine_of(shape, host.card)
    if not engine or not host.free:
        return []
    loaded, _ = dtype_on(host.card, engine, dtype)
    if not loaded:
        return []
    found = []
    for tp, pp in _splits(shape, loaded, len(host.free), host.nvlink):
        for kv_dtype in kv_dtypes:
            if kv_dtype not in host.card.generation.kv_dtypes:
                continue
            setup = Setup(loaded, demand.length, tp, pp, kv_dtype, engine=engine)
            sums = memory(shape, setup, host.card)
            if not sums.fits or sums.kv_tokens.value < context:
                continue
            speed = llm_speed(shape, setup, host.card, nvlink=host.nvlink)
            rate = most(speed, demand, sums.concurrent.value)
            found.append(Layout(setup, len(host.free) // setup.cards, sums, speed, rate))
    return found


def _splits(shape: Shape, dtype: str, cards: int, nvlink: bool) -> Iterator[tuple[int, int]]:
    """(tp, pp) inside a host, by size. Stages inside a host are for cards without NVLink, or where no tp fits."""
    sizes = [tp for tp in range(1, cards + 1) if not tp_fault(shape, tp, dtype)]
    whole = [(tp, 1) for tp in sizes]
    stages = [(tp, pp) for tp in sizes for pp in range(2, cards // tp + 1) if pp <= shape.layers]
    if nvlink:
        stages = [(tp, pp) for tp, pp in stages if tp * pp == cards and cards not in sizes]
    yield from sorted(whole + stages, key=lambda split: (split[0] * split[1], split[1]))


def lacking(shape: Shape, dtype: str, host: Host, length: int) -> str:
    """Why nothing fits on this host, with the sum."""
    engine = engine_of(shape, host.card)
    if not engine:
        return f"{host.node.name}: no LLM engine runs on {host.card.name} ({host.card.generation.name})"
    loaded, why = dtype_on(host.card, engine, dtype)
    if not loaded:
        return f"{host.node.name}: {why}"
    sizes = [tp for tp in range(1, len(host.free) + 1) if not tp_fault(shape, tp, loaded)]
    if not sizes:
        return f"{host.node.name}: no card is free"
    sums = memory(shape, Setup(loaded, length, sizes[-1], engine=engine), host.card)
    need = sums.weights.value + sums.overhead.value + sums.kv_card.value * length
    return (
        f"{host.node.name}: at tp {sizes[-1]} each {host.card.name} needs {sums.weights.value / GIB:.1f} GiB of weights"
        f" + {sums.overhead.value / GIB:.1f} GiB of activations + {sums.kv_card.value * length / GIB:.1f} GiB of KV for"
        f" one request of {length:,} tokens = {need / GIB:.1f} GiB, and has {host.card.memory * 0.9 / GIB:.1f} "
        f"({host.card.memory / GIB:.1f} × 0.9)"
    )
