"""A Prometheus server, Debian's program or one in a container, and what it says to the dashboard and the alerts."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.render.dashboard import dashboard_text
from tests.kit.debian import unpacked


def prometheus_binary() -> str:
    """Raises NoProgram: not on PATH, and this machine's package archive has none."""
    if found := shutil.which("prometheus"):
        return found
    return str(unpacked("prometheus", ["prometheus"], suite="trixie") / "usr" / "bin" / "prometheus")


@contextmanager
def running_prometheus(folder: Path, configuration: Path) -> Iterator[Prometheus]:
    """With its data below `folder`. The body waits for what it needs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
    words = [prometheus_binary(), f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*words, f"--web.listen-address={address}"], cwd=folder, stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **query: str) -> Any:
        """Raises ValueError for what Prometheus refuses, OSError where nobody answers."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(url, timeout=10) as reply:
                return json.loads(reply.read())["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(error.read().decode()[:500]) from None

    def down(self) -> list[str]:
        targets = self.get("targets")["activeTargets"]
        return [f"{one['labels']['job']}: {one['lastError']}" for one in targets if one["health"] != "up"]

    def values(self, query: str, window: str) -> list[float]:
        """What a panel's query gives now, over `window` where Grafana would choose one; without those that are NaN."""
        found = self.get("query", query=query.replace("$__rate_interval", window))["result"]
        return [value for one in found if not math.isnan(value := float(one["value"][1]))]

    def without_data(self, window: str) -> list[str]:
        return [query for query in expressions() if not self.values(query, window)]

    def rules(self) -> dict[str, str]:
        """Alert -> its health: `ok` once it has been evaluated."""
        groups = self.get("rules")["groups"]
        return {rule["name"]: rule.get("lastError") or rule["health"] for group in groups for rule in group["rules"]}


def expressions() -> list[str]:
    """Every query of the dashboard."""
    panels = json.loads(dashboard_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]
