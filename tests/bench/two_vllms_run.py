"""Two real vLLM instances on CPU cores of their own, one of them slowed to half, and a client with its own clock."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import grpc.aio
import numpy as np
import psutil

from infermesh.transport import channel_options
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc as lm_grpc
from registry.endpoint import Speed
from tests.bench.load import watch_idle
from tests.bench.peers_run import ROOT
from tests.kit.children import Child, infermesh
from tests.kit.llm import PYTHON, llm_python

MODEL = "tiny"
BLOCK = 32  # tokens of vLLM's KV block
BUDGET = 2048  # prompt tokens a step
CONTEXT = 4096
# Wide enough that a prompt of 2,000 tokens takes the better part of a second on one core.
SHAPE = "t.HIDDEN, t.LAYERS, t.HEADS, t.KV_HEADS, t.HEAD_DIM, t.INNER = 512, 6, 8, 4, 64, 1536"
SIZES = (256, 640, 1024, 1824)  # of calibration
STEPS = 64
ROUNDS = 5
BRAKE_S = 0.5  # until the brake bites


@dataclass(frozen=True, slots=True)
class Card:
    """One instance: the core it is bound to, its KV room, and whether it runs half of the time."""

    id: str
    core: int
    blocks: int
    halved: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """A calibrated instance. `fixed_s`: what every request takes beside its prefill, in this process and that one."""

    speed: Speed
    fixed_s: float
    prefill_s: tuple[float, ...]  # at SIZES


@dataclass(frozen=True, slots=True)
class Ask:
    at: float
    prefix: int
    tokens: tuple[int, ...]
    output: int


@dataclass(slots=True)
class Seen:
    ttft: float = -1.0
    cached: int = 0
    instance: str = ""


@dataclass(slots=True)
class Run:
    seen: list[Seen]
    idle: list[float] = field(default_factory=list)


def write_model(folder: Path) -> Path:
    code = f"import services.llm.tiny_model as t; from pathlib import Path; {SHAPE}; t.INITIALIZER_RANGE = 0.05; "
    llm_python("-P", "-c", f"{code}t.write_tiny_model(Path({str(folder)!r}))")
    return folder


@contextmanager
def instance(folder: Path, model: Path, card: Card, *flags: str) -> Iterator[Child]:
    """Starts one on its core and does not wait for it."""
    bound = (f"VLLM_CPU_OMP_THREADS_BIND={card.core}", "OMP_NUM_THREADS=1")
    words = ("--engine", "vllm", "--model", MODEL, "--source", str(model), "--instance-id", card.id)
    args = (f"block_size={BLOCK}", f"num_gpu_blocks_override={card.blocks}", f"max_num_batched_tokens={BUDGET}")
    words += tuple(word for arg in args for word in ("--engine-arg", arg))
    words += ("--max-context", str(CONTEXT), "--listen", "127.0.0.1:0", "--grace-s", "2", "--log-level", "warning")
    child = Child(folder, card.id, ["env", *bound, *infermesh("llm", *words, *flags, python=str(PYTHON))])
    try:
        yield child
    finally:
        child.destroy()


@contextmanager
def halved(leader: int) -> Iterator[None]:
    """The engine under this process runs half of the time; what speaks gRPC does not slow down."""
    family = psutil.Process(leader).children(recursive=True)
    engine = next(one for one in family if "EngineCore" in " ".join([one.name(), *one.cmdline()]))
    brake = subprocess.Popen([sys.executable, "-m", "tests.bench.half_speed", str(engine.pid)], cwd=ROOT)
    try:
        yield
    finally:
        brake.terminate()
        brake.wait()


@contextmanager
def mesh(
    folder: Path, model: Path, cards: Sequence[Card], speeds: dict[str, Speed]
) -> Iterator[tuple[str, dict[str, str]]]:
    """The gateway's gRPC address, and each instance's own."""
    with ExitStack() as stack:

        def begin(name: str, *words: str) -> Child:
            child = Child(folder, name, infermesh(*words))
            stack.callback(child.destroy)
            return child

        url = f"mesh://{begin('registry', 'registry', '--listen', '127.0.0.1:0').address}"
        begun = {}
        for card in cards:
            speed = speeds[card.id]
            flags = ("--registry", url, "--prefill-tps", str(speed.prefill_tps), "--step-ms", str(speed.step_ms))
            flags += ("--prefill-doubling-ctx", str(speed.prefill_doubling_ctx), "--kv-us-per-ktoken", "0")
            begun[card.id] = stack.enter_context(instance(folder, model, card, *flags))
        addresses = {id: child.address for id, child in begun.items()}
        for card in cards:
            if card.halved:
                stack.enter_context(halved(begun[card.id].pid))
        doors = ("--grpc", "127.0.0.1:0", "--http", "", "--log-level", "warning")
        gateway = begin("gateway", "gateway", *doors, "--registry", url)
        yield str(gateway.told()["grpc"]), addresses


async def calibrated(address: str, engine: int, seed: int = 0) -> tuple[Measured, Measured]:
    """Unhindered and halved, by direct requests one at a time, in turn, so that what else the machine does meets both;
    the median of ROUNDS. TTFT = fixed + n / tps · (1 + n / 2 / doubling)."""
    random = np.random.default_rng(seed)
    ttfts: dict[tuple[bool, int], list[float]] = {(half, size): [] for half in (False, True) for size in SIZES}
    paces: dict[bool, list[float]] = {False: [], True: []}
    async with grpc.aio.insecure_channel(address, channel_options()) as channel:
        stub: Any = lm_grpc.LanguageModelServiceStub(channel)

        async def ask(size: int, output: int) -> tuple[float, float]:
            seen, begun = Seen(), time.perf_counter()
            await one(stub, Ask(0.0, 0, tuple(map(int, random.integers(3, 880, size))), output), begun, seen)
            return seen.ttft, time.perf_counter() - begun

        for size in (*SIZES, *SIZES):  # kernels are made at the first prompt of a size
            await ask(size, 2)
        for _ in range(ROUNDS):
            for half in (False, True):
                with halved(engine) if half else nullcontext():
                    if half:
                        await asyncio.sleep(BRAKE_S)
                    for size in SIZES:
                        ttfts[half, size].append((await ask(size, 1))[0])
                    first, whole = await ask(64, STEPS)
                    paces[half].append((whole - first) / (STEPS - 1))
    fast, slow = (
        fitted([median(ttfts[half, size]) for size in SIZES], 1000 * median(paces[half])) for half in (False, True)
    )
    return fast, slow


def fitted(seconds: Sequence[float], step_ms: float) -> Measured:
    """Least squares of relative errors; a term that would be below 0 is left out."""
    sizes = np.array(SIZES, dtype=float)
    terms = {"fixed": np.ones_like(sizes), "linear": sizes, "quadratic": sizes * sizes / 2}
    while True:
        columns = np.stack(list(terms.values()), axis=1) / np.array(seconds)[:, None]
        solved = dict(zip(terms, np.linalg.lstsq(columns, np.ones_like(sizes), rcond=None)[0], strict=True))
        negative = [name for name, value in solved.items() if value <= 0 and name != "linear"]
        if not negative:
            break
        del terms[negative[0]]
    linear = max(float(solved["linear"]), 1e-7)
    doubling = linear / max(float(solved.get("quadratic", 0.0)), 1e-12)
    speed = Speed(1 / linear, min(doubling, 1e7), step_ms, 0.0, source="calibrated")
    return Measured(speed, float(solved.get("fixed", 0.0)), tuple(seconds))


async def drive(asks: Sequence[Ask], addresses: Sequence[str]) -> Run:
    """Every request at its own time; with several addresses each in turn."""
    run = Run([Seen() for _ in asks])
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, channel_options()))
            for address in addresses
        ]
        stubs: list[Any] = [lm_grpc.LanguageModelServiceStub(channel) for channel in channels]
        watch = asyncio.create_task(watch_idle(run.idle))
        begun = time.perf_counter() + 0.2
        pairs = zip(asks, run.seen, strict=True)
        await asyncio.gather(
            *(one(stubs[place % len(stubs)], ask, begun + ask.at, seen) for place, (ask, seen) in enumerate(pairs))
        )
        watch.cancel()
    return run


async def one(stub: Any, ask: Ask, due: float, seen: Seen) -> None:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    request = lm.CompleteRequest(model=MODEL)
    request.token_ids.ids.extend(ask.tokens)
    request.sampling.MergeFrom(lm.Sampling(max_tokens=ask.output, temperature=0, ignore_eos=True))
    async for event in stub.Complete(request, timeout=300):
        if seen.ttft < 0:
            seen.ttft = time.perf_counter() - due
            seen.cached, seen.instance = event.started.cached_tokens, event.started.instance_id
