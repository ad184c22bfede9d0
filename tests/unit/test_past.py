"""Decisions that are kept: a ring on disk that stays small, survives damage and restarts, and finds what it has."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.gateway.past import decisions as past_decisions
from services.gateway.past.decisions import SHOWN, Decisions, kept, past, shown
from services.gateway.past.ring import CHUNK, FILES, Ring
from services.gateway.report import Report, Tried
from services.gateway.routing.decision import TERMS, Candidate, Record


def line(number: int, size: int = 100) -> bytes:
    return b'{"request_id":"r%d","x":"' % number + b"x" * size + b'"}'


def find(ring: Ring, number: int) -> bytes | None:
    return ring.find(b'{"request_id":"r%d",' % number, lambda _: True)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def record(chosen: str = "a", count: int = 2, **more: Any) -> Record:
    ids = [f"i{number:04}" for number in range(count - 1)] + [chosen]
    found = tuple(Candidate(id, 1.0 + n, (0.5, 0, 0, 0.25, 0, n, 0), 1.0, n, True) for n, id in enumerate(sorted(ids)))
    return Record("llm", "m", chosen, "least_cost", found, (("z", "draining"),), 100, 10, **more)


def report(id: str = "r1", tenant: str = "t", **more: Any) -> Report:
    tried = (Tried(record("a"), "engine_failed"), Tried(record("b", degraded_from="big"), "ok"))
    given: dict[str, Any] = {"record": tried[-1].record, "tried": tried, "attempts": 2, "outcome": "ok", **more}
    return Report(id, "chat", tenant, "m", instance="b", served_model="m", **given)


def test_the_ring_stays_within_its_bytes_and_forgets_the_oldest(tmp_path: Path) -> None:
    ring = Ring(tmp_path, 80_000)
    for start in range(0, 2000, 50):
        ring.append([line(number) for number in range(start, start + 50)])
        assert size(tmp_path) <= 80_000
    assert size(tmp_path) > 60_000, "it uses its room"
    assert find(ring, 1999) == line(1999) and find(ring, 0) is None
    there = [number for number in range(2000) if find(ring, number)]
    assert there == list(range(there[0], 2000)) and len(there) > 450
    ring.append([line(5000, 20_000), line(5001)])
    assert find(ring, 5000) is None and find(ring, 5001), "a line as large as a file is left out alone"


def test_it_survives_restarts_and_damage(tmp_path: Path) -> None:
    ring = Ring(tmp_path, 1 << 20)
    ring.append([line(1), line(2)])
    with pytest.raises(BlockingIOError):
        Ring(tmp_path, 1 << 20)
    ring.close()
    first = next(path for path in tmp_path.glob("*.jsonl") if path.stat().st_size)
    text = first.read_bytes()
    first.write_bytes(text[:-40])  # cut short in its last line
    (tmp_path / "notes.jsonl").write_text("somebody else's")
    again = Ring(tmp_path, 1 << 20)
    again.append([line(3), line(1, 5)])
    assert find(again, 2) is None and find(again, 3) and find(again, 1) == line(1, 5), "the newest of an id"
    first.write_bytes(b"\x00\xff\n" * 1000 + text)
    assert find(again, 2) == line(2)
    again.close()
    for _ in range(FILES + 20):
        Ring(tmp_path, 1 << 20).close()
    assert len(list(tmp_path.glob("0*.jsonl"))) <= FILES
    assert (tmp_path / "notes.jsonl").exists()


def test_lines_are_found_wherever_the_reads_cut_them(tmp_path: Path) -> None:
    ring = Ring(tmp_path, 64 << 20)
    lines = [line(number, 1000 + 997 * number % 5000) for number in range(400)]
    ring.append(lines)
    assert size(tmp_path) > 3 * CHUNK
    assert [find(ring, number) for number in range(400)] == lines
    assert ring.find(b'{"request_id":"r39', lambda found: b'"r390"' in found) == lines[390]


def test_a_full_disk_damages_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(tmp_path, 1 << 20)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr("os.write", lambda fd, data: write(fd, data[:30]))
        with pytest.raises(OSError, match="No space"):
            ring.append([line(1)])
    ring.append([line(2)])
    assert find(ring, 1) != line(1) and find(ring, 2) == line(2)


def test_what_is_kept_reads_back_as_it_is_shown() -> None:
    found = past(kept(1700000000.5, report(ttft_s=0.5, completion_tokens=9)))
    want = json.loads(json.dumps(shown(record("b", degraded_from="big"))))
    assert {key: found[key] for key in want} == want
    assert set(want["candidates"][0]["terms"]) == set(TERMS)
    assert [(d["chosen"], d["outcome"]) for d in found["decisions"]] == [("a", "engine_failed"), ("b", "ok")]
    assert found["request"] | {"request_id": "r1", "at": 1700000000.5, "ttft_s": 0.5} == found["request"]
    turned_away = past(kept(1.0, report(record=None, tried=(), outcome="invalid_argument")))
    assert (turned_away["chosen"], turned_away["reason"], turned_away["decisions"]) == ("", "invalid_argument", [])
    left = past(kept(1.0, report(record=record("w"), tried=())))
    assert [d["chosen"] for d in left["decisions"]] == ["w"], "who left while waiting had a decision too"
    for damaged in (b"", b"{}", b"[1]", b'{"request_id":"r1","at":1', kept(1.0, report())[:-30]):
        with pytest.raises(ValueError):
            past(damaged)


def test_of_many_candidates_the_cheapest_and_the_chosen_are_kept() -> None:
    big = record("zz", 1000)
    found = past(kept(1.0, report(record=big, tried=(Tried(big, "ok"),))))
    ids = [one["id"] for one in found["candidates"]]
    assert len(ids) == SHOWN and "zz" in ids and ids == sorted(ids) and ids[0] == "i0000"
    assert found["unexamined"] == 1000 - SHOWN


async def test_only_the_own_tenants_are_found_and_after_a_restart_too(tmp_path: Path) -> None:
    kept_here = Decisions(Ring(tmp_path, 1 << 20))
    for tenant in ("mine", "other"):
        kept_here.keep(report("same", tenant, outcome=tenant))
    kept_here.keep(report("r2", "other"))
    found = await kept_here.find("same", lambda tenant: tenant == "mine")
    assert found is not None and found["request"]["outcome"] == "mine"
    newest = await kept_here.find("same", lambda _: True)
    assert newest is not None and newest["request"]["outcome"] == "other"
    assert await kept_here.find("r2", lambda tenant: tenant == "mine") is None
    assert await kept_here.find('r2"', lambda _: True) is None
    await kept_here.close()
    again = Decisions(Ring(tmp_path, 1 << 20))
    assert await again.find("r2", lambda _: True) and await again.since()
    await again.close()


async def test_keeping_costs_a_request_nothing_to_speak_of_and_a_slow_disk_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(past_decisions, "PENDING", 1000)
    kept_here = Decisions(Ring(tmp_path, 1 << 20))
    one = report()
    begun = time.process_time()
    for _ in range(3000):
        kept_here.keep(one)
    assert (time.process_time() - begun) / 3000 < 20e-6  # half a microsecond on an idle machine
    assert len(kept_here._pending) == 1000 and kept_here._dropped == 2000
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await kept_here.flush()
    counting.cancel()
    assert not kept_here._pending and turns > 1000 / past_decisions.BATCH
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(kept_here._ring, "append", lambda _: (_ for _ in ()).throw(TypeError("odd")))
        for _ in range(3):
            kept_here.keep(one)
            await kept_here.flush()
        assert kept_here._dropped == 3 and not logs, "what goes wrong here stops nobody, and is told once a minute"
        patch.setattr(past_decisions, "WARN_S", 0.0)
        kept_here.keep(one)
        await kept_here.flush()
        assert [(line["why"], line["lost"]) for line in logs] == [("TypeError: odd", 4)]
    kept_here.keep(report("last"))
    assert await kept_here.find("last", lambda _: True), "and works again when the disk does"
    await kept_here.close()


async def test_whoever_leaves_while_his_answer_is_looked_up_lets_no_two_write_at_once(tmp_path: Path) -> None:
    ring = Ring(tmp_path, 1 << 20)
    kept_here, append = Decisions(ring), ring.append
    begun, go_on = threading.Semaphore(0), threading.Event()
    inside = 0

    def slow(lines: Sequence[bytes]) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        begun.release()
        go_on.wait()
        append(lines)
        inside -= 1

    ring.append = slow  # type: ignore[method-assign]
    for id in ("r1", "r2"):
        kept_here.keep(report(id))
        asking = asyncio.create_task(kept_here.find(id, lambda _: True))
        await asyncio.sleep(0)
        if id == "r1":
            assert await asyncio.to_thread(begun.acquire, timeout=30)
        asking.cancel()
        await asyncio.wait({asking})
    kept_here.keep(report("r3"))
    found = asyncio.create_task(kept_here.find("r3", lambda _: True))
    assert not await asyncio.to_thread(begun.acquire, timeout=0.2), "the first one still writes"
    go_on.set()
    assert await found and all([await kept_here.find(id, lambda _: True) for id in ("r1", "r2")])
    await kept_here.close()
