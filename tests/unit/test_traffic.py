"""What is recorded of a request, what is not, and that a slow reader costs the gateway nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infermesh.cli.record import line_of
from infermesh.errors import MeshError
from services.gateway.past import traffic
from services.gateway.past.traffic import Traffic, traced
from services.gateway.report import Report
from services.gateway.routing.decision import Record
from services.gateway.routing.facts import Facts
from services.gateway.simulator.trace import parse_trace

SALT = b"s" * 32
CHAIN = (0x0123456789ABCD, 0x0FEDCBA987654321)


def report(facts: dict[str, Any] | None = None, **more: Any) -> Report:
    told = {"kind": "llm", "model": "chat", "klass": "core", "tenant": "acme", "chain": CHAIN, "chain_share": 0.4}
    given: dict[str, Any] = {
        "facts": Facts(**{**told, **(facts or {})}),
        "record": Record("llm", "chat", "a", prompt_tokens=300, output_tokens=70),
        "ttft_s": 0.25,
        "duration_s": 2.0,
        "prompt_tokens": 250,
        "completion_tokens": 41,
        "cached_tokens": 100,
        "outcome": "ok",
        **more,
    }
    return Report("req-1", "chat", "acme", "chat", instance="a", served_model="chat-v1", attempts=1, **given)


def test_a_line_is_one_that_sim_reads_and_says_nothing_else() -> None:
    facts = {"session_id": "alice", "document_id": "memo", "priority": -3, "max_tokens": 64, "degrade": False}
    text = line_of(traced(1_700_000_002.0, report(facts), SALT))
    assert text.endswith("\n") and text.count("\n") == 1
    assert not any(secret in text for secret in ("acme", "alice", "memo", "req-1", *map(str, CHAIN)))
    line = json.loads(text)
    assert line["timestamp"] == 1_700_000_000_000 and line["block_tokens"] == 100
    found = parse_trace([text])
    one = found.requests[0]
    assert (one.prompt, one.output, one.kind, one.model, one.klass) == (250, 41, "llm", "chat", "core")
    assert (one.priority, one.max_tokens, one.degrade, len(one.chain)) == (-3, 64, False, 2)
    assert found.block_tokens == 100
    assert one.measured is not None
    told = one.measured
    assert (told.outcome, told.instance, told.ttft_s, told.e2e_s, told.cached) == ("ok", "a", 0.25, 2.0, 100)
    assert set(line) == {
        *("timestamp", "input_length", "output_length", "hash_ids", "block_tokens", "kind", "model", "tenant", "class"),
        *("priority", "max_tokens", "session_id", "document_id", "degrade"),
        *("outcome", "instance", "served_model", "cached_tokens", "ttft_ms", "e2e_ms"),
    }


def test_names_and_blocks_are_equal_within_a_recording_and_only_there() -> None:
    one, same, other = (traced(1.0, report(), salt) for salt in (SALT, SALT, b"t" * 32))
    assert one == same and one.tenant and one.hash_ids[0] != one.hash_ids[1]
    assert not set(one.hash_ids) & set(other.hash_ids) and one.tenant != other.tenant
    assert all(0 <= id < 1 << traffic.HASH_BITS for id in one.hash_ids)
    shorter = traced(1.0, report({"chain": CHAIN[:1]}), SALT)
    assert list(shorter.hash_ids) == list(one.hash_ids[:1])
    assert traced(1.0, report({"session_id": ""}), SALT).session_id == ""


def test_a_request_that_nobody_began_is_estimated() -> None:
    shed = report(outcome="queue_full", ttft_s=0.0, prompt_tokens=0, completion_tokens=0)
    one = traced(1.0, shed, SALT)
    assert (one.input_length, one.output_length, one.outcome) == (300, 70, "queue_full")
    cut = traced(10.0, report(outcome="cancelled", completion_tokens=0), SALT)
    assert cut.output_length == 0 and parse_trace([line_of(cut)]).requests[0].output == 1


async def test_a_recording_begins_with_what_arrives_then_and_leaves_out_what_is_no_work() -> None:
    all_of_it = Traffic()
    all_of_it.keep(report())  # nobody listens
    with all_of_it.tap() as tap:
        begun = tap._begun
        tap.put(begun + 1.9, report())  # arrived before
        tap.put(begun + 2.1, report())
        tap.put(begun + 9, report({"slots": 0}))  # counting tokens
        tap.put(begun + 9, report(outcome="model_not_found"))
        tap.put(begun + 9, Report("r", "chat", "t", "m", "permission_denied"))
        assert [ended for ended, _ in await tap.take(1)] == [begun + 2.1]
        assert await tap.take(0.01) == [] and tap.dropped == 0
    all_of_it.keep(report())
    assert await tap.take(0.01) == []


async def test_a_slow_reader_loses_requests_and_hears_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "REQUESTS", 100)
    monkeypatch.setattr(traffic, "BLOCKS", 150)
    with Traffic().tap() as tap:
        for number in range(90):
            tap.put(tap._begun + 10, report({"chain": CHAIN} if number % 2 else {"chain": ()}))
        assert tap.dropped == 0 and tap._blocks == 90
        for _ in range(40):
            tap.put(tap._begun + 10, report())
        assert tap.dropped == 30 and tap._blocks == 110, "at 100 requests it is full"
        taken = [await tap.take(1), await tap.take(1)]
        assert [len(batch) for batch in taken] == [traffic.BATCH, 100 - traffic.BATCH] and tap._blocks == 0
        tap.put(tap._begun + 10, report({"chain": tuple(range(151))}))
        assert tap.dropped == 31, "and so it is at its blocks"
        tap.put(tap._begun + 10, report())
        assert len(await tap.take(1)) == 1


def test_recordings_are_few() -> None:
    one = Traffic()
    taps = [one.tap() for _ in range(traffic.TAPS)]
    for tap in taps:
        tap.__enter__()
    with pytest.raises(MeshError, match="end one first"), one.tap():
        pass
    taps[0].__exit__(None, None, None)
    with one.tap():
        pass
    assert len(one._taps) == traffic.TAPS - 1
