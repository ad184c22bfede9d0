"""Rows 5-11, 16, 71: instances whose connections are fine and whose work is not."""

from __future__ import annotations

import asyncio
import math
import time

from tests.fault.fleet import fleet
from tests.fault.load import Told, ask, listed, quantile, streams
from tests.fault.matrix import Ground, Measured, Row
from tests.fault.rest import chat, post, session

THREE = ("a", "b", "c")


def _nexts(hurt: list[Told], at: float) -> list[float]:
    """How long those whose stream had begun waited for their next token."""
    return [told.next_after(at) for told in hurt if told.at and told.at[0] < at]


def _hit(nexts: list[float]) -> str:
    return f"{len(nexts)} streams hit, next token after at most {max(nexts, default=math.nan):.2f} s"


async def blocked_loop(ground: Ground) -> Measured:
    """The event loop stands still for 5 s; the C core still answers pings."""
    async with fleet(ground.folder, *THREE, breakable=True) as mesh:
        async with streams(mesh.client, 18) as load:
            await asyncio.sleep(4)
            at = time.monotonic()
            hurt = load.on("a", at)
            mesh.broken("a", block_s=5)
            gone = await mesh.until(lambda states: states.get("a") != "healthy", 6, at)
            back = await mesh.until(lambda states: states.get("a") == "healthy", 30, at)
            await asyncio.sleep(1)
        nexts = _nexts(hurt, at)
        text = f"out of work after {gone:.2f} s, back {back - 5:.1f} s after the loop went on; {_hit(nexts)}; {load}"
        return Measured(gone <= 2.5 and back < 35 and not load.failures and max(nexts, default=99) < 3.5, text)


async def wedged(ground: Ground) -> Measured:
    """No step is made any more; health says SERVING, Link and load reports go on."""
    async with fleet(ground.folder, *THREE, breakable=True) as mesh:
        async with streams(mesh.client, 18) as load:
            await asyncio.sleep(4)
            at = time.monotonic()
            mesh.broken("a", wedge=True)
            hurt = load.on("a", at)
            gone = await mesh.until(lambda states: states.get("a") != "healthy", 15, at)
            await asyncio.sleep(max(0.0, 6 - (time.monotonic() - at)))
            mesh.broken("a")
            back = await mesh.until(lambda states: states.get("a") == "healthy", 30)
        nexts = _nexts(hurt, at)
        text = f"out of work after {gone:.2f} s, back {back:.1f} s after it was mended; {_hit(nexts)}; {load}"
        return Measured(gone <= 3.0 and back < 60 and not load.failures, text)


async def stalled(ground: Ground) -> Measured:
    """One stream stops after five tokens, its neighbours in the same engine go on."""
    async with fleet(ground.folder, *THREE, breakable=True) as mesh:
        for id in mesh.llms:
            mesh.broken(id, stall="sleepyhead")
        await asyncio.sleep(0.2)
        async with streams(mesh.client, 9) as load:
            await asyncio.sleep(1)
            one = await ask(mesh.client, Told(60, time.monotonic()), "sleepyhead", timeout=15)
            seen = list((await mesh.states()).values())
        text = (
            f"the stalled stream: {one.error or 'whole'}, longest pause {one.pause_s:.1f} s; others: {load}; "
            f"states {', '.join(seen)}"
        )
        return Measured(one.ok and one.pause_s < 6 and not load.failures and seen.count("healthy") == 3, text)


async def long_prompt(ground: Ground) -> Measured:
    """A prompt that takes over a minute: nothing is heard of its call meanwhile, and nothing is wrong with it."""
    seconds, tokens_per_s = ground.seconds(65), 20
    async with fleet(ground.folder, *THREE, flags=("--prefill-tps", str(tokens_per_s), "--step-ms", "10")) as mesh:
        before = (await mesh.metrics()).get("infermesh_gateway_ejections_total", 0)
        prompt = " ".join(f"word{number}" for number in range(round(seconds * tokens_per_s)))
        async with streams(mesh.client, 3, tokens=10, pause_s=1.0) as load:
            asked = asyncio.create_task(ask(mesh.client, Told(5, time.monotonic()), prompt, timeout=10 * seconds))
            bad = 0
            while not asked.done():
                bad += any(state != "healthy" for state in (await mesh.states()).values())
                await asyncio.sleep(0.5)
        one = await asked
        ejected = (await mesh.metrics()).get("infermesh_gateway_ejections_total", 0) - before
        text = (
            f"first token after {one.ttft_s:.0f} s: {one.error or 'whole'}, {one.served.attempts} attempt; {ejected:g} "
            f"ejections, {bad} times one seen out of work; others: {load}"
        )
        fine = one.ok and one.ttft_s >= min(60.0, seconds) and one.served.attempts == 1
        return Measured(fine and not ejected and not bad and not load.failures, text)


async def slower(ground: Ground) -> Measured:
    """One of three becomes ten times slower: work moves away from it."""
    async with fleet(ground.folder, *THREE, breakable=True) as mesh:
        async with streams(mesh.client, 12, tokens=30) as load:
            await asyncio.sleep(8)
            at = time.monotonic()
            calm = [told.seconds for told in load.between(at - 7, at)]
            mesh.broken("a", slow=10)
            settle = 25.0
            await asyncio.sleep(settle + ground.seconds(25))
            end = time.monotonic()
            late = load.between(at + settle, end)
            share = sum(told.served.instance_id == "a" for told in late) / max(1, len(late))
            mesh.broken("a")
            await asyncio.sleep(1)
        before, after = quantile(calm, 0.99), quantile((told.seconds for told in late), 0.99)
        text = (
            f"p99 of a stream {before:.2f} s before, {after:.2f} s from {settle:g} s after on "
            f"({after / before:.2f} x); the slow one gets {share:.1%} of requests; {load}"
        )
        return Measured(after <= 1.5 * before and not load.failures, text)


async def unavailable(ground: Ground) -> Measured:
    async with fleet(ground.folder, *THREE, breakable=True) as mesh:
        async with streams(mesh.client, 12, tokens=10) as load:
            await asyncio.sleep(2)
            at, had = time.monotonic(), mesh.calls("a")
            mesh.broken("a", fail=1.0)
            gone = await mesh.until(lambda states: states.get("a") != "healthy", 10, at)
            reached = mesh.calls("a") - had
            await asyncio.sleep(max(0.0, 12 - (time.monotonic() - at)))
            probes = mesh.calls("a") - had - reached
            mesh.broken("a")
            back = await mesh.until(lambda states: states.get("a") == "healthy", 60)
        text = (
            f"out of work after {gone:.2f} s and {reached} failed requests; {probes} more in the 12 s of the "
            f"fault; back {back:.1f} s after it was mended; {load}"
        )
        few = len(load.failures) <= 0.01 * len(load.done)
        return Measured(gone <= 5 and reached <= 8 and probes <= 4 and back < 60 and few, text)


async def grey(ground: Ground) -> Measured:
    async with fleet(ground.folder, *THREE, breakable=True) as mesh:
        async with streams(mesh.client, 12, tokens=5) as load:
            await asyncio.sleep(2)
            at = time.monotonic()
            mesh.broken("a", fail=0.3)
            gone = await mesh.until(lambda states: states.get("a") != "healthy", 15, at)
            await asyncio.sleep(3)
            mesh.broken("a")
            await asyncio.sleep(1)
        return Measured(gone <= 10 and not load.failures, f"out of work after {gone:.2f} s; {load}")


async def all_fail(ground: Ground) -> Measured:
    """Whatever is tried fails: few extra attempts, quick refusals that say when to come again."""
    async with fleet(ground.folder, *THREE, breakable=True) as mesh:
        for id in mesh.llms:
            mesh.broken(id, fail=1.0)
        await asyncio.sleep(0.2)
        async with session() as one:
            answers = []
            until = time.monotonic() + ground.seconds(8)
            while time.monotonic() < until:
                answers += await asyncio.gather(*(post(one, mesh.http(), chat()) for _ in range(20)))
                await asyncio.sleep(0.1)
            reached = sum(mesh.calls(id) for id in mesh.llms)
            for id in mesh.llms:
                mesh.broken(id)
            mended = time.monotonic()
            again = math.inf
            while time.monotonic() - mended < 70:
                if (await post(one, mesh.http(), chat())).status == 200:
                    again = time.monotonic() - mended
                    break
                await asyncio.sleep(0.1)
        tail = answers[len(answers) // 2 :]
        told = sum("retry-after" in answer.headers for answer in tail)
        sdk = sum(answer.headers.get("x-should-retry") == "false" for answer in tail)
        share = reached / len(answers)
        kinds = listed(answer.error for answer in answers)
        text = (
            f"{len(answers)} requests made {reached} attempts ({share:.2f} x){kinds}; "
            f"slowest {max(a.seconds for a in answers):.2f} s; of the later {len(tail)}, {told} say retry-after and "
            f"{sdk} x-should-retry: false; served again {again:.1f} s after mending"
        )
        fine = all(answer.status in (500, 503) for answer in answers)
        return Measured(share <= 1.2 and fine and told == len(tail) and again < 60, text)


async def warming_up(ground: Ground) -> Measured:
    async with fleet(ground.folder, "a") as mesh:
        child = mesh.add_llm("b", faults={"start_s": 4})
        states = []
        async with streams(mesh.client, 4, tokens=10) as load:
            begun = time.monotonic()
            while not child.serves:
                states.append((await mesh.states()).get("b", "not listed"))
                await asyncio.sleep(0.1)
            loaded = time.monotonic() - begun
            took = await mesh.until(lambda states: states.get("b") == "healthy", 10)
        early = [state for state in states if state not in ("not listed", "starting")]
        text = f"loaded after {loaded:.1f} s, until then {sorted(set(states))}; healthy {took:.2f} s later; {load}"
        return Measured(not early and took < 3 and not load.failures, text)


ROWS = (
    Row(5, "event loop blocked for 5 s", "out of work within 2.5 s, back by itself, 0 failed", blocked_loop),
    Row(6, "engine wedged, health says SERVING", "out of work within 3 s by the progress watchdog, 0 failed", wedged),
    Row(
        7, "one stream stalls, others do not", "only that one moves, whole, within 6 s; no instance is ejected", stalled
    ),
    Row(8, "instance 10 x slower", "p99 of the pool at most 1.5 x, 0 failed", slower, 180),
    Row(
        9,
        "100 % errors from one instance",
        "out of work after 3 failures in a row, then trials only; at most 1 % beyond the retry budget",
        unavailable,
        180,
    ),
    Row(10, "30 % errors from one instance", "out of work within 10 s, 0 failed", grey),
    Row(
        11, "all instances fail", "at most 1.2 attempts a request, 5xx with retry-after, back by itself", all_fail, 180
    ),
    Row(16, "warm-up not finished", "not listed, or no work, until it serves", warming_up),
    Row(71, "a call silent for 60 s: a long prompt", "goes on where it is, 0 out of work, 0 failed", long_prompt, 300),
)
