"""A real Prometheus scrapes a real gateway while an instance is killed: every panel of the dashboard has data."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import aiohttp
import pytest
import yaml

from deploy.render.shipped import shipped_files
from infermesh.client import AsyncClient
from tests.kit.debian import NoProgram, not_here
from tests.kit.mesh import running_mesh, until
from tests.kit.prometheus import Prometheus, prometheus_binary, running_prometheus

SPEED = ("--prefill-tps", "20000", "--step-ms", "5")
DOCUMENT = "The mesh remembers what it has read. " * 100
# Not brought about here: calls cut to move, fallback models, scaled groups, a collector that is away, an own loop.
ABSENT = ("abandoned_total", "degrades_total", "gateway_replicas", "desired_replicas", "spans_dropped", "loop_hold")


def configuration(folder: Path, gateway: str) -> Path:
    """The shipped one with this gateway, scraped and judged every second."""
    told = yaml.safe_load(shipped_files()["prometheus/prometheus.yaml"])
    told["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    told["scrape_configs"] = [job for job in told["scrape_configs"] if job["job_name"] == "gateway"]
    told["scrape_configs"][0]["static_configs"] = [{"targets": [gateway]}]
    told["rule_files"] = [str(folder / "alerts.yaml")]
    (folder / "alerts.yaml").write_text(shipped_files()["prometheus/alerts.yaml"])
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


async def chats(client: AsyncClient) -> None:
    while True:
        async for _ in client.chat_stream(DOCUMENT, model="chat", max_tokens=60):
            pass


@pytest.mark.slow
async def test_every_panel_has_data_and_every_alert_evaluates(tmp_path: Path) -> None:
    try:
        prometheus_binary()
    except NoProgram as why:
        not_here(why)
    async with running_mesh(tmp_path, {"a": SPEED, "b": SPEED}, http="127.0.0.1:0") as mesh:
        with running_prometheus(tmp_path, configuration(tmp_path, mesh.http)) as prometheus:
            await until(lambda: scraped(prometheus), 30)
            async with AsyncClient(mesh.address) as client:
                callers = [asyncio.create_task(chats(client)) for _ in range(6)]
                async with aiohttp.ClientSession(trust_env=False) as session:
                    async with session.post(f"http://{mesh.http}/v1/embeddings", data=b"{") as reply:
                        assert reply.status == 400
                await until(lambda: busy(prometheus), 30)
                mesh.instances["a"].kill()

                async def settled() -> bool:
                    await asyncio.sleep(0.5)
                    assert not [one for one in callers if one.done()], "a chat failed"
                    return not await asyncio.to_thread(missing, prometheus)

                try:
                    await until(settled, 40)
                except TimeoutError:
                    raise AssertionError(f"no data: {missing(prometheus)}") from None
                for one in callers:
                    one.cancel()
                await asyncio.gather(*callers, return_exceptions=True)


def missing(prometheus: Prometheus) -> list[str]:
    """Queries without data, and alerts that are not evaluated."""
    empty = [query for query in prometheus.without_data("2m") if not any(name in query for name in ABSENT)]
    rules = prometheus.rules()
    return [
        *empty,
        *(f"{name}: {health}" for name, health in rules.items() if health != "ok"),
        *([] if rules else ["no alert"]),
    ]


async def scraped(prometheus: Prometheus) -> bool:
    await asyncio.sleep(0.2)
    with contextlib.suppress(OSError):
        return bool(await asyncio.to_thread(prometheus.values, 'up{job="gateway"} == 1', ""))
    return False


async def busy(prometheus: Prometheus) -> bool:
    """Some answers are whole, as two scrapes have seen."""
    await asyncio.sleep(0.2)
    return bool(await asyncio.to_thread(prometheus.values, "sum(rate(infermesh_gateway_tokens_total[10s])) > 0", ""))
