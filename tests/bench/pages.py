"""Results of a bench in a page of docs/, between markers: `<!-- NAME -->` … `<!-- end NAME -->`."""

from __future__ import annotations

from pathlib import Path


def put_section(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: the page lacks them.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    old = page.read_text()
    if old.count(begin) != 1 or old.count(end) != 1:
        raise ValueError(f"{page}: one {begin} and one {end} are needed")
    head, rest = old.split(begin)
    tail = rest.split(end)[1]
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
