"""`infermesh record` where its file cannot be written to the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from infermesh.cli import connect, main
from infermesh.v1 import mesh_pb2 as ms


class OneRequest:
    def record(self) -> Iterator[ms.RecordTrafficResponse]:
        yield ms.RecordTrafficResponse()
        yield ms.RecordTrafficResponse(requests=[ms.TracedRequest(kind="llm", model="m")])


def test_a_full_disk_is_told_with_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(path: Path, *_: Any, **how: Any) -> Any:
        path.touch()
        return open("/dev/full", "w", encoding="utf-8")

    monkeypatch.setattr(connect, "client", lambda *_: nullcontext(OneRequest()))
    monkeypatch.setattr(Path, "open", full)
    assert main(["record", "-o", str(tmp_path / "mine.jsonl")]) == 1
    told = capsys.readouterr().err
    assert f"infermesh: --output {tmp_path / 'mine.jsonl'}: No space left on device" in told
    assert not (tmp_path / "mine.jsonl").exists()  # nothing of use is in it
