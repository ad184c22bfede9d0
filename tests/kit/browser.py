"""A real Chromium for tests of the console, from the system (Debian: `apt-get install chromium`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import sync_playwright

from tests.kit.debian import not_here

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# What a headless browser needs not do: sandboxes want a setuid helper, and its own calls home want a network.
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]


def chromium() -> str:
    """Its path; without one the test is skipped, but fails where CI promises one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        not_here("no Chromium on PATH: apt-get install chromium")
    return str(found)


@contextmanager
def page(width: int = 1280, height: int = 860, **context: Any) -> Iterator[Any]:
    """A page of a fresh browser. Errors that scripts or the content policy raise in it fail the block at its end."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=OPTIONS)
        made = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()
        faults: list[str] = []
        made.on("pageerror", lambda error: faults.append(str(error)))
        made.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        try:
            yield made
        finally:
            browser.close()
        assert not [fault for fault in faults if "Failed to load resource" not in fault], faults
