"""Rows 1-4, 12, 13: instances that die or freeze."""

from __future__ import annotations

import asyncio
import math
import random
import time

from tests.fault.fleet import Fleet, fleet
from tests.fault.load import Load, Told, ask, listed, quantile, streams
from tests.fault.matrix import Ground, Measured, Row
from tests.fault.rest import rest_burst

THREE = ("a", "b", "c")
SLOW_PREFILL = ("--prefill-tps", "40", "--step-ms", "5")  # the handful of tokens of a prompt takes 0.2 s


async def unary_killed(ground: Ground) -> Measured:
    """Non-streamed answers over REST: everything that the dead one had is asked of another one. Each burst with a kill
    is compared with a calm one just before it: the same instances serve both, one of them perhaps starting slowly."""
    async with fleet(ground.folder, *THREE, flags=SLOW_PREFILL) as mesh:
        errors, retried, added = [], 0, []
        for _ in range(ground.runs(3)):
            calm = await rest_burst(mesh, 24)
            asked = asyncio.create_task(rest_burst(mesh, 24))
            victim = await _with_work(mesh)
            mesh.llms[victim].kill()
            killed = time.monotonic()
            burst = await asked
            errors += [answer.error for answer in (*calm, *burst) if answer.error]
            hurt = [answer.ended - killed for answer in burst if answer.attempts > 1]
            retried += len(hurt)
            if hurt:
                added.append(max(hurt) - max(answer.seconds for answer in calm))
            mesh.again(victim)
            await mesh.healthy()
        each = ", ".join(f"{seconds * 1000:+.0f}" for seconds in added)
        text = f"{len(errors)} errors, {retried} retried; {each} ms beside the longest of a calm burst just before"
        return Measured(not errors and bool(added) and max(added) <= 0.2, text + listed(errors))


async def _with_work(mesh: Fleet, least: int = 2) -> str:
    """The first instance that has something to do."""
    async with asyncio.timeout(10):
        while True:
            for id in mesh.llms:
                if await mesh.busy(id) >= least:
                    return id


async def killed_before_first_token(ground: Ground) -> Measured:
    async with fleet(ground.folder, *THREE, flags=SLOW_PREFILL) as mesh:
        asked = [Told(1, time.monotonic()) for _ in range(30)]  # one token: nothing is ever half told
        burst = asyncio.gather(*(ask(mesh.client, told, f"question {n}") for n, told in enumerate(asked)))
        victim = await _with_work(mesh)
        mesh.llms[victim].kill()
        killed = time.monotonic()
        await burst
        waited = [told for told in asked if told.ttft_s + told.began > killed and told.served.attempts > 1]
        errors = [told.error for told in asked if told.error]
        text = (
            f"{len(errors)} errors of 30, {len(waited)} moved, attempts {sorted({w.served.attempts for w in waited})}"
        )
        return Measured(
            not errors and bool(waited) and all(w.served.attempts == 2 for w in waited), text + listed(errors)
        )


async def killed_mid_stream(ground: Ground) -> Measured:
    """64 streams on three instances; one is killed at a random moment, and comes back, again and again. A new fleet
    after each five: ejections last longer from life to life."""
    draw = random.Random(3)
    kills: list[tuple[float, list[Told]]] = []
    calm, all_of_them = 0.0, Load()
    while (left := ground.runs(5) - len(kills)) > 0:
        folder = ground.folder / str(len(kills))
        folder.mkdir()
        async with fleet(folder, *THREE) as mesh:
            async with streams(mesh.client, 64) as load:
                await asyncio.sleep(6)
                calm = calm or quantile((told.seconds for told in load.done), 0.99)
                for _ in range(min(5, left)):
                    await asyncio.sleep(draw.uniform(0.5, 2.0))
                    at = time.monotonic()
                    victim = draw.choice([id for id in THREE if load.on(id, at)])
                    hurt = load.on(victim, at)
                    mesh.llms[victim].kill()
                    kills.append((at, hurt))
                    mesh.again(victim)
                    await mesh.healthy(within_s=90)  # repeated kills: as long as an ejection may last
            all_of_them.all += load.all
    return _pauses(all_of_them, kills, calm, 0.5)


def _pauses(load: Load, faults: list[tuple[float, list[Told]]], calm_s: float, most_s: float) -> Measured:
    """What those who were hit saw: the time from the fault to their next token, and how they ended."""
    nexts = [told.next_after(at) for at, hurt in faults for told in hurt if told.at and told.at[0] < at]
    slow = [told for told in load.done if not told.error and told.seconds > 3 * calm_s]
    text = (
        f"{len(faults)} faults, {len(nexts)} streams hit; {load}; longest fault-to-next-token "
        f"{max(nexts, default=math.nan):.2f} s, p50 {quantile(nexts, 0.5):.2f} s; {len(slow)} slower than 3 x calm p99"
    )
    ok = bool(nexts) and not load.failures and max(nexts) <= most_s and not slow
    return Measured(ok, text)


async def frozen(ground: Ground) -> Measured:
    """SIGSTOP in the middle of streams and of prompts, SIGCONT after everybody has gone elsewhere."""
    draw = random.Random(4)
    async with fleet(ground.folder, *THREE) as mesh:
        async with streams(mesh.client, 24) as load:
            await asyncio.sleep(4)
            calm = quantile((told.seconds for told in load.done), 0.99)
            faults = []
            noticed = []
            for _ in range(ground.runs(5)):
                await asyncio.sleep(draw.uniform(0.5, 1.5))
                at = time.monotonic()
                victim = draw.choice([id for id in THREE if load.on(id, at)])
                hurt = load.on(victim, at)
                mesh.llms[victim].freeze()
                noticed.append(await mesh.until(lambda states, v=victim: states.get(v) not in ("healthy",), 10, at))
                await asyncio.sleep(2.5)
                mesh.llms[victim].thaw()
                faults.append((at, hurt))
                await mesh.healthy()
        found = _pauses(load, faults, max(calm, 2.0), 3.0)
        return Measured(
            found.ok and max(noticed) <= 2.0, f"out of work after at most {max(noticed):.2f} s; {found.text}"
        )


async def crash_loop(ground: Ground) -> Measured:
    """One of three dies two seconds after each start; the others carry the load."""
    async with fleet(ground.folder, *THREE) as mesh:
        async with streams(mesh.client, 12, tokens=20) as load:
            await asyncio.sleep(2)
            crashes = ground.runs(6)
            changes, last = 0, "healthy"
            for _ in range(crashes):
                mesh.llms["a"].kill()
                child = mesh.again("a")
                await mesh.started(child)
                until = time.monotonic() + 2
                while time.monotonic() < until:
                    state = (await mesh.states()).get("a", "gone")
                    changes += state != last
                    last = state
                    await asyncio.sleep(0.05)
        errors = load.failures
        text = f"{crashes} crashes; {load}; {changes} changes of state seen"
        return Measured(not errors and changes <= 5 * crashes, text)


ROWS = (
    Row(1, "SIGKILL, unary in flight", "retried, 0 client errors, at most 200 ms more", unary_killed),
    Row(2, "SIGKILL before the first token", "retried, 0 errors, 2 attempts told", killed_before_first_token),
    Row(
        3,
        "SIGKILL mid-stream, 64 streams on 3 instances",
        "0 failed, no token lost or doubled, next token within 0.5 s of the kill, all within 3 x calm p99",
        killed_mid_stream,
        limit_s=1800,
    ),
    Row(
        4,
        "SIGSTOP mid-stream, SIGCONT later",
        "out of work within 2 s, next token within 3 s, 0 failed, no late output",
        frozen,
        limit_s=900,
    ),
    Row(13, "crash loop, every 2 s", "0 client errors, no flapping", crash_loop),
)
