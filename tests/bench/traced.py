"""What spans cost the gateway, and what a collector that fails does to requests; each in turns, in one run.

    make traced [ARGS="--write"]           about six minutes; prints two tables, and puts them into docs/bench.md

Gateways alike but for their spans stand before the same scripted instances; each round asks every one of them, briefly:
what else the machine does is then much the same for all. Shown are medians over the rounds, and of the ratios to the
gateway of the first row in the same round also where the middle half of them lies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from load import Ask, Run, grpc_load
from pages import put_section

from tests.kit.children import Child, Children, leave_nothing_when_told_to_stop
from tests.kit.collector import collector

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bench.md"
SECTION = "spans"
TINY, LONG = Ask("fast", 1), Ask("paced", 128, streamed=True)
CLIENTS = 16


@dataclass(frozen=True)
class Asked:
    """One gateway in one round."""

    run: Run
    cpu_us: float  # of its process, a request

    @property
    def rps(self) -> float:
        return self.run.rps


async def collect(ready: Path, hangs: bool, slow_s: float) -> None:
    """The collector's process; ends with SIGTERM."""
    async with collector(hangs=hangs, slow_s=slow_s, keep=False) as sink:  # a real one hands on what it gets
        part = ready.with_suffix(".part")
        part.write_text(json.dumps({"address": sink.address}))
        part.rename(ready)
        await asyncio.Event().wait()


def cpu_s(child: Child) -> float:
    """What its threads have run, to the nanosecond; the usual count has steps of 10 ms."""
    threads = Path(f"/proc/{child.pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


async def ask(child: Child, what: Ask, clients: int, requests: int) -> Asked:
    before = cpu_s(child)
    run = await grpc_load(str(child.told()["grpc"]), what, clients=clients, count=requests)
    return Asked(run, (cpu_s(child) - before) / (requests + 1) * 1e6)


async def rounds(
    gateways: Mapping[str, Child], what: Ask, clients: int, count: int, requests: int
) -> dict[str, list[Asked]]:
    """Each gateway's, round by round. The order turns, so that none always comes after the same one."""
    found: dict[str, list[Asked]] = {name: [] for name in gateways}
    names = list(gateways)
    for number in range(count + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            asked = await ask(gateways[name], what, clients, requests)
            if number:  # the first one warms up
                found[name].append(asked)
    return found


def ratio(of: list[float], to: list[float]) -> str:
    """The median of the rounds' ratios, and where the middle half of them lies."""
    low, middle, high = statistics.quantiles((one / other for one, other in zip(of, to, strict=True)), n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})" if of != to else "1"


async def costs(gateways: Mapping[str, Child], count: int) -> list[str]:
    """A table: how many requests a second, and how much CPU a request, by the share of traces that is kept."""
    lines = [
        "| request | traces kept | requests/s | of off | gateway CPU a request | of off |",
        "|---|---|---|---|---|---|",
    ]
    for label, what, requests in (("chat of 1 token", TINY, 160), ("stream of 128 tokens", LONG, 32)):
        found = await rounds(gateways, what, CLIENTS, count, requests)
        first = found["off"]
        for name, asked in found.items():
            rps, cpu = [one.rps for one in asked], [one.cpu_us for one in asked]
            numbers = f"{statistics.median(rps):.0f} | {ratio(rps, [one.rps for one in first])}"
            spent = f"{statistics.median(cpu):.0f} µs | {ratio(cpu, [one.cpu_us for one in first])}"
            lines.append(f"| {label} | {name} | {numbers} | {spent} |")
    return lines


async def outages(gateways: Mapping[str, Child], count: int) -> list[str]:
    """A table: latency and memory, by what the collector does."""
    lines = ["| collector | p50 ms | of well | p99 ms | of well | memory | after as much again | spans dropped |"]
    lines.append("|" + "---|" * 8)
    found = await rounds(gateways, TINY, 1, count, 60)
    memory = {name: memory_mib(child) for name, child in gateways.items()}
    again = await rounds(gateways, TINY, 1, count, 60)
    p99 = {name: whole([*found[name], *again[name]]).quantile_ms(0.99) for name in gateways}
    for name, child in gateways.items():
        mine, well = ([one.run.quantile_ms(0.5) for one in [*found[of], *again[of]]] for of in (name, "well"))
        cells = [name, f"{statistics.median(mine):.2f}", ratio(mine, well)]
        cells += [f"{p99[name]:.2f}", f"{p99[name] / p99['well']:.2f}"]
        cells += [f"{memory[name]:.1f} MiB", f"{memory_mib(child) - memory[name]:+.1f} MiB", str(await dropped(child))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def whole(asked: list[Asked]) -> Run:
    """All rounds as one."""
    return Run([latency for one in asked for latency in one.run.latencies])


def memory_mib(child: Child) -> float:
    return float(psutil.Process(child.pid).memory_info().rss) / 2**20


async def dropped(child: Child) -> int:
    import aiohttp

    base = f"http://{child.told()['http']}"
    async with aiohttp.ClientSession(base, trust_env=False) as session, session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return int(
        next(float(line.split()[-1]) for line in lines if line.startswith("infermesh_gateway_spans_dropped_total"))
    )


def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def report(count: int) -> str:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = Path(folder)
        sinks = {
            name: Child(run, f"collector-{name}", [sys.executable, "-m", "tests.bench.traced", *how])
            for name, how in {"well": (), "hangs": ("--hangs",), "slow": ("--slow-s", "2")}.items()
        }
        for sink in sinks.values():
            stack.callback(sink.destroy)
        children = stack.enter_context(Children(run))
        registry = children.start("registry", "--listen", "127.0.0.1:0")
        joined = ("--registry", f"mesh://{registry.address}")
        for model, pace in (("fast", ()), ("paced", ("--step-ms", "1"))):
            engine = ("--engine", "scripted", "--model", model, "--max-running", "1024", *pace)
            children.start("llm", *engine, *joined, "--listen", "127.0.0.1:0", name=model).told()

        def started(kinds: Mapping[str, tuple[str, ...]]) -> dict[str, Child]:
            doors = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--explain-mib", "0", "--grace-s", "2")
            made = {
                name: children.start("gateway", *doors, *joined, *flags, name=f"gateway-{name}")
                for name, flags in kinds.items()
            }
            for child in made.values():
                child.told()
            return made

        well = ("--otlp", sinks["well"].address)
        gateways = started({"off": (), "1 %": (*well, "--otlp-ratio", "0.01"), "100 %": well})
        lines = asyncio.run(costs(gateways, count))
        for child in gateways.values():
            child.end()
        gateways = started(
            {
                "well": well,
                "away": ("--otlp", nobody()),
                "hangs": ("--otlp", sinks["hangs"].address),
                "slow": ("--otlp", sinks["slow"].address),
            }
        )
        lines += ["", *WHAT_FAILS, "", *asyncio.run(outages(gateways, count))]
    return "\n".join(lines)


WHAT_FAILS = (
    "Every trace kept, one client, chats of one token. `away`: nobody listens; `hangs`: takes each call and never",
    "answers; `slow`: answers after two seconds. Memory is the gateway's, after half of the requests and after all.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/bench.md")
    parser.add_argument("--ready-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hangs", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--slow-s", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ready_file:
        asyncio.run(collect(args.ready_file, args.hangs, args.slow_s))
        return
    text = report(args.rounds)
    print(text)
    if args.write:
        put_section(PAGE, SECTION, text)


if __name__ == "__main__":
    leave_nothing_when_told_to_stop()
    main()
