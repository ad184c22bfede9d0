"""A whole mesh as processes, for clients that know nothing of us: registry, gateway with keys, a scripted LLM, and the
real MiniLM for embedding and rerank."""

from __future__ import annotations

import hashlib
import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.kit.children import Children
from tests.kit.embedding import EXPORTS

KEY, POOR_KEY = "sk-test-all", "sk-test-poor"  # the poor one may spend 20 tokens a minute


@dataclass(frozen=True)
class Served:
    """`url` is the REST address without a path."""

    url: str
    grpc: str


@contextmanager
def served_mesh(folder: Path) -> Iterator[Served]:
    """Runs it until the end of the block; every part must leave well then."""
    keys = folder / "keys.yaml"
    entries = [
        {"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "tenant": "all"},
        {"sha256": hashlib.sha256(POOR_KEY.encode()).hexdigest(), "tenant": "poor", "tokens_per_minute": 20},
    ]
    keys.write_text(yaml.safe_dump({"version": 1, "keys": entries}))
    with Children(folder) as children:
        address = ("--registry", f"mesh://{children.start('registry', '--listen', '127.0.0.1:0').address}")
        local = (*address, "--listen", "127.0.0.1:0", "--grace-s", "2")
        encoder = (*local, "--export-dir", str(EXPORTS))
        speed = ("--prefill-tps", "1e6", "--step-ms", "1")
        doors = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
        started = [
            children.start("gateway", *address, *doors, "--keys", str(keys)),
            children.start("llm", "--engine", "scripted", "--model", "chat", *speed, *local),
            children.start("embedding", *encoder),
            children.start("rerank", *encoder),
        ]
        gateway, *_ = [child.told() for child in started]
        served = Served(f"http://{gateway['http']}", gateway["grpc"])
        _until_ready(served.url)
        yield served


def _until_ready(url: str) -> None:
    """All three kinds are listed."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"authorization": f"Bearer {KEY}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 20
    while True:
        with direct.open(request, timeout=5) as answer:
            kinds = {model["kind"] for model in json.load(answer)["data"]}
        if kinds == {"llm", "embedding", "rerank"}:
            return
        assert time.monotonic() < deadline, f"only {kinds} are there"
        time.sleep(0.05)
