"""A soak: random faults, one every 10 to 20 s, in a mesh under load for as long as is told; row 69 of the matrix.

    make soak MINUTES=10

Success is a complete and right answer; every other one is listed. Memory of the gateways must not grow, their file
descriptors must be back where they were.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from tests.fault.fleet import Fleet, fleet
from tests.fault.load import Load, streams
from tests.fault.matrix import Ground, Measured, Row
from tests.kit.children import leave_nothing_when_told_to_stop

ALL = ("a", "b", "c", "d")
SUCCESS = 0.999
Act = Callable[[Fleet, str], Awaitable[None]]


async def _killed(mesh: Fleet, id: str) -> None:
    mesh.llms[id].kill()
    await asyncio.sleep(1)
    mesh.again(id)


async def _frozen(mesh: Fleet, id: str) -> None:
    mesh.llms[id].freeze()
    await asyncio.sleep(4)
    mesh.llms[id].thaw()


async def _blocked(mesh: Fleet, id: str) -> None:
    mesh.broken(id, block_s=4)
    await asyncio.sleep(5)
    mesh.broken(id)


async def _wedged(mesh: Fleet, id: str) -> None:
    mesh.broken(id, wedge=True)
    await asyncio.sleep(5)
    mesh.broken(id)


async def _failing(mesh: Fleet, id: str) -> None:
    mesh.broken(id, fail=1.0)
    await asyncio.sleep(5)
    mesh.broken(id)


async def _slow(mesh: Fleet, id: str) -> None:
    mesh.broken(id, slow=5)
    await asyncio.sleep(5)
    mesh.broken(id)


async def _restarted(mesh: Fleet, id: str) -> None:
    child = mesh.llms[id]
    child.popen.send_signal(signal.SIGTERM)
    await asyncio.to_thread(child.popen.wait, 20)
    mesh.again(id)


async def _drained_hard(mesh: Fleet, id: str) -> None:
    child = mesh.llms[id]
    for _ in range(2):
        child.popen.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
    await asyncio.to_thread(child.popen.wait, 20)
    mesh.again(id)


async def _gateway_restarted(mesh: Fleet, id: str) -> None:
    """A gateway leaves as a rolling restart makes it; the clients go on with the other one."""
    number = ALL.index(id) % len(mesh.gateways)
    child = mesh.gateways[number]
    child.popen.send_signal(signal.SIGTERM)
    await asyncio.to_thread(child.popen.wait, 20)
    await mesh.started(mesh.gateway_again(number))


ACTS: dict[str, Act] = {
    "kill": _killed,
    "freeze": _frozen,
    "block": _blocked,
    "wedge": _wedged,
    "fail": _failing,
    "slow": _slow,
    "restart": _restarted,
    "hard stop": _drained_hard,
    "gateway": _gateway_restarted,
}


async def soak(folder: Path, minutes: float, seed: int = 1, say: Callable[[str], None] = lambda _: None) -> Measured:
    """Two gateways, four instances, sixteen callers that know both gateways."""
    draw = random.Random(seed)
    async with fleet(folder, *ALL, breakable=True, gateways=2) as mesh:
        done: Counter[str] = Counter()
        notes: list[str] = []
        begun = time.monotonic()
        async with streams(mesh.client, 16, tokens=40, pause_s=0.1) as load:
            await asyncio.sleep(5)
            base = _sizes(mesh)
            while time.monotonic() - begun < 60 * minutes:
                await asyncio.sleep(draw.uniform(10, 20))
                name, id = draw.choice(list(ACTS)), draw.choice(ALL)
                known = len(load.failures)
                at = time.monotonic() - begun
                await ACTS[name](mesh, id)
                done[name] += 1
                await mesh.healthy(within_s=90)
                if new := load.failures[known:]:
                    notes.append(f"{at:.0f} s {name} {id}: {len(new)} x {new[0][:120]}")
                    say(notes[-1])
            await asyncio.sleep(5)
        await mesh.idle(10)
        await asyncio.sleep(2)
        left, end = await mesh.leftovers(), _sizes(mesh)
        return _judged(load, done, notes, base, end, left, minutes)


def _sizes(mesh: Fleet) -> list[tuple[int, float, int]]:
    """Of each gateway: its process id, MiB, descriptors."""
    gateways = [psutil.Process(child.pid) for child in mesh.gateways]
    return [(one.pid, one.memory_info().rss / 2**20, one.num_fds()) for one in gateways]


def _judged(
    load: Load,
    done: Counter[str],
    notes: list[str],
    base: list[tuple[int, float, int]],
    end: list[tuple[int, float, int]],
    left: str,
    minutes: float,
) -> Measured:
    good = 1 - len(load.failures) / max(1, len(load.done))
    faults = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    sizes = ", ".join(
        f"{after[1]:.0f} MB ({before[1]:.0f}), {after[2]} fds ({before[2]})"
        + ("" if before[0] == after[0] else " reborn")
        for before, after in zip(base, end, strict=True)
    )
    flat = all(
        after[1] < before[1] + 40 and after[2] <= before[2] + 12 for before, after in zip(base, end, strict=True)
    )
    text = (
        f"{minutes:g} min, {sum(done.values())} faults ({faults}): {good:.3%} of {len(load.done)} whole; "
        f"gateways {sizes}; left over: {left or 'nothing'}" + (f"; failures: {'; '.join(notes)}" if notes else "")
    )
    return Measured(good >= SUCCESS and flat and not left, text)


async def row(ground: Ground) -> Measured:
    return await soak(ground.folder, ground.seconds(180) / 60)


ROWS = (Row(69, "chaos soak: random faults every 10-20 s", "at least 99.9 % whole, memory flat, fds back", row, 7200),)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the order of faults")
    given = parser.parse_args()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="infermesh-soak-") as folder:
        measured = asyncio.run(soak(Path(folder), given.minutes, given.seed, lambda line: print(line, flush=True)))
    print(f"{'ok' if measured.ok else 'FAILED'}: {measured.text}")
    return 0 if measured.ok else 1


if __name__ == "__main__":
    leave_nothing_when_told_to_stop()
    sys.exit(main())
