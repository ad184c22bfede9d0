"""Documents -> passages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from examples.rag.passages import LONGEST, split

TEXT = """Before any heading.

# Routing

First paragraph.

Second paragraph.

## Cost

```
# a comment, not a heading
```

# Health
"""


def test_passages_follow_headings_and_say_where_they_are_from() -> None:
    assert [one.text for one in split("notes/on-the_way.md", TEXT)] == [
        "on the way\nBefore any heading.",
        "on the way › Routing\nFirst paragraph.\n\nSecond paragraph.",
        "on the way › Routing › Cost\n```\n# a comment, not a heading\n```",
    ]
    one, two = split("b.txt", "word " * 120 + "\n\n" + "other " * 90)
    assert one.text.startswith("b\nword") and two.text.startswith("b\nother") and two.position == 1
    assert one.id != two.id and one.document_id == two.document_id
    (long,) = split("c.md", "# " + "heading " * 300 + "\nwhat it says")
    assert long.text.endswith("what it says") and len(long.text) <= LONGEST
    assert split("empty.md", " \n\n# Only a heading\n") == []


@given(st.text(max_size=4000))
def test_nothing_is_lost_and_nothing_is_too_long(text: str) -> None:
    found = split("d.txt", text)
    assert all(len(one.text) <= LONGEST for one in found)
    assert [one.position for one in found] == list(range(len(found)))
    if "#" not in text:
        words = "".join(text.split())
        assert "".join("".join(one.text.partition("\n")[2].split()) for one in found) == words
