"""The image files: what they are made from is here, and they run as the user that `render` assumes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.render.container import MODELS, UID
from tests.kit.rendering import ROOT

IMAGES = sorted((ROOT / "deploy" / "images").glob("*.Dockerfile"))


def test_there_is_one_for_each_image_that_render_names() -> None:
    assert [path.stem for path in IMAGES] == ["encoder", "gateway", "llm"]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_an_image_is_made_from_what_is_here_and_runs_unprivileged(path: Path) -> None:
    text = path.read_text()
    steps = [line.split(maxsplit=1) for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert [what for step, what in steps if step == "USER"] == [f"{UID}:{UID}"]
    assert [what for step, what in steps if step == "ENTRYPOINT"] == ['["infermesh"]']
    made = re.findall(r"(?:constraints|packages)/[a-z./-]*[a-z]", text.replace("$ACCELERATOR", "gpu"))
    assert made and [name for name in made if not (ROOT / name).exists()] == []
    assert f" {MODELS} /cache" in text and "HOME=/cache" in text
    assert not re.search(r"https?://", text), "no registry's address is in the repository"
