"""A decision record as people read it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from infermesh.cli import explain
from services.gateway.past.decisions import kept, past, shown
from services.gateway.report import Report, Tried
from services.gateway.routing import filters
from services.gateway.routing.decision import TERMS, Candidate, Record

CANDIDATES = (
    Candidate("a", 2.5, (1.25, 0.0, 0.0, 0.25, 0.0, 1.0, 0.0), 1.0, 1536, True),
    Candidate("b", 0.5, (0.0, 0.0, 0.0, 0.25, 0.0, 0.25, 0.0), 2.0, 0, False),
)
RECORD = Record(
    "llm", "large", "b", "least_cost", CANDIDATES, (("c", "context_over"), ("d", "feature:tools"), ("e", "new_word")),
    2000, 300, estimate_s=0.5, waited_s=0.0125, cached_tokens=0, predicted_ttft_s=0.25, degraded_from="huge",
)  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], show: Any, record: Any) -> list[str]:
    show(json.loads(json.dumps(record)))
    return capsys.readouterr().out.splitlines()


def test_the_chosen_one_comes_first_with_every_term(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, explain._print, shown(RECORD))
    assert lines[0] == "large (llm, degraded from huge): b, the least cost"
    assert lines[1] == "first token due in 250 ms, cost 500 ms, waited 12.5 ms"
    assert lines[2] == "prompt 2000 tokens, 0 thought to be cached; answer 300 tokens expected"
    head = next(line.split() for line in lines if "INSTANCE" in line)
    assert head == ["INSTANCE", "COST", *(term.upper() for term in TERMS), "CACHED", "WEIGHT", "READY"]
    rows = [re.split(r"\s{2,}", line) for line in lines[4:6]]
    assert rows[0] == ["->", "b", "500 ms", "0", "0", "0", "250 ms", "0", "250 ms", "0", "0", "2", "no"]
    assert rows[1] == ["", "a", "2.5 s", "1.25 s", "0", "0", "250 ms", "0", "1 s", "0", "1536", "1", "yes"]
    assert lines[6:] == [
        "rejected c: context_over (prompt and answer are longer than it takes)",
        "rejected d: feature:tools (lacks tools)",
        "rejected e: new_word",
    ]


def test_many_candidates_are_cut_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    many = tuple(Candidate(f"i{n:03}", float(n), (0.0,) * 6, 1.0, 0, True) for n in range(50))
    record = Record("llm", "m", "i040", "least_cost", many, unexamined=7)
    lines = printed(capsys, explain._print, shown(record))
    rows = [line for line in lines[1:] if " i0" in line]
    assert len(rows) == explain.SHOWN and rows[0].startswith("->  i040")
    assert lines[-1] == f"and {50 - explain.SHOWN + 7} more, none of them sooner"


def test_nobody_chosen_has_no_times(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, explain._print, shown(Record("llm", "m", reason="model_not_found")))
    assert lines == ["m (llm): nobody, model_not_found"]


def test_a_past_request_shows_what_was_predicted_and_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(
        "req-1", "chat", "acme", "huge", "ok", "b", "large", 2, 0.31, 4.0, 2000, 120, 512, RECORD,
        (Tried(RECORD, "engine_failed"), Tried(RECORD, "ok")),
    )  # fmt: skip
    lines = printed(capsys, explain._print_past, past(kept(1_700_000_000.0, report)))
    assert lines[0] == "req-1: chat, model huge, tenant acme" and lines[1].endswith("after 4 s: ok")
    assert "first token after 310 ms, predicted was 250 ms" in lines
    assert "prompt 2000 tokens, 512 cached; answer 120 tokens" in lines
    ends = [line for line in lines if line.startswith("decision ")]
    assert ends == ["decision 1 of 2, which ended as engine_failed", "decision 2 of 2, which ended as ok"]
    assert lines.count("large (llm, degraded from huge): b, the least cost") == 2


def test_every_word_of_the_filters_is_said_out_and_documented() -> None:
    listed = (filters.__doc__ or "").partition("Words:")[2].partition(".\n")[0]
    words = {word.strip() for word in listed.replace("\n", " ").split(",")} - {"feature:<name>"}
    assert len(words) > 8 and words == set(explain.REJECTIONS)
    page = (Path(__file__).resolve().parents[2] / "docs" / "architecture.md").read_text()
    assert [word for word in words if word not in page] == []
