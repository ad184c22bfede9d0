"""What a running project is held against. Each check adds its line."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from docker import DockerClient
from docker.models.containers import Container

from infermesh.client import AsyncClient, MeshError, Reason
from tests.container.fleet import CHAT, EMBEDDING, GRACE_S, LLMS, RERANK, UID, Project
from tests.kit.traffic import PROMPT, TEXTS, Load, traffic

PROJECT = {"label": "com.docker.compose.project=infermesh"}
TOKENS, CHATS = 200, 3  # long enough for streams to be cut when an instance dies
DOCUMENT = "The mesh remembers what it has read. " * 20  # longer than a block of the prefix cache
AGAIN_S = 240  # until a killed instance serves again
PROBE = "id -u; grep -E '^(CapEff|NoNewPrivs)' /proc/1/status; touch /written 2>&1"


@dataclass
class Lines:
    all: list[tuple[str, bool, str]] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        return [what for what, ok, _ in self.all if not ok]

    def add(self, what: str, ok: bool, measured: str) -> None:
        self.all.append((what, ok, measured))
        print(f"{'ok    ' if ok else 'FAILED'}  {what}: {measured}", flush=True)

    def table(self, where: str) -> str:
        rows = [f"| {what} | {measured} |" for what, _, measured in self.all]
        return "\n".join([f"| `make compose`, {where} | |", "|---|---|", *rows])


def service(client: DockerClient, name: str) -> Container:
    told = [f"com.docker.compose.service={name}", PROJECT["label"]]
    (found,) = client.containers.list(all=True, filters={"label": told})
    return found


def confined(client: DockerClient, lines: Lines) -> None:
    """Every container as it runs, not as it was asked for."""
    wrong, ours = [], 0
    for one in client.containers.list(filters=PROJECT):
        told, name = one.attrs, one.labels["com.docker.compose.service"]
        user, mine = ("10001", True) if name != "consul" else ("100", False)
        ours += mine
        inside = one.exec_run(["sh", "-c", PROBE]).output.decode().split()
        seen: dict[str, Any] = {
            "user": inside[0] == user,
            "capabilities": inside[2] == "0" * 16,
            "no new privileges": inside[4] == "1",
            "read-only root": "Read-only" in inside,
            "healthy": told["State"]["Health"]["Status"] == "healthy",
            "stop grace": not mine or told["Config"]["StopTimeout"] > GRACE_S,
        }
        wrong += [f"{name}: {what}" for what, held in seen.items() if not held]
    measured = ", ".join(wrong) or f"all {ours} and Consul"
    lines.add(
        f"uid {UID}, no capability, no new privileges, read-only root, healthy", not wrong and ours == 5, measured
    )


async def killed_and_stopped(client: DockerClient, project: Project, lines: Lines) -> None:
    async with AsyncClient(project.grpc, api_key=project.key) as caller:
        answer = (await caller.chat(PROMPT, model=CHAT, max_tokens=TOKENS, temperature=0)).text
        vectors = await caller.embed(TEXTS, model=EMBEDDING)
        hits = await caller.rerank("a pet", TEXTS, model=RERANK)
        best = max(hits, key=lambda hit: hit.score).index
        lines.add(
            "chat, embedding and rerank through the gateway",
            bool(answer) and len(vectors) == 2 and best == 0,
            f"{TOKENS} tokens, {len(vectors)} × {len(vectors[0])} numbers, the cat before the stocks",
        )

        async with AsyncClient(project.grpc) as stranger:
            try:
                told = str(await stranger.embed(TEXTS, model=EMBEDDING))
            except MeshError as error:
                told = error.reason.value
        lines.add("the same without a key", told == Reason.UNAUTHENTICATED.value, told)

        async def serves(id: str) -> bool:
            listed = await caller.instances()
            return any(one.id == id and one.state == "healthy" for one in listed)

        async def busiest() -> str:
            """One that has streams under way, which have to go on elsewhere."""
            while True:
                count = {one.id: one.in_flight for one in await caller.instances() if one.id in LLMS}
                if any(count.values()):
                    return max(count, key=count.__getitem__)

        asked = {"chat": CHAT, "encoder": EMBEDDING, "reranker": RERANK, "tokens": TOKENS, "answer": answer}
        async with traffic(project.grpc, project.http, chats=CHATS, key=project.key, **asked) as load:
            await _more(load, 30)
            for _ in range(5):  # over several scrapes
                await caller.chat(DOCUMENT, model=CHAT, max_tokens=4)
                await asyncio.sleep(3)
            victim = await busiest()
            first = service(client, victim)
            begun = time.monotonic()
            await asyncio.to_thread(first.exec_run, ["sh", "-c", "kill -9 -1"])
            await _until(lambda: _restarted(first), 60)
            await _until(lambda: serves(victim), AGAIN_S)
            back = time.monotonic() - begun
            await _more(load, 30)
        _judge(
            lines,
            f"every process of the busier LLM killed under load: restarted, serves again after {back:.0f} s",
            load,
        )

        async with traffic(project.grpc, project.http, chats=CHATS, key=project.key, **asked) as load:
            await _more(load, 30)
            second = service(client, await busiest())
            begun = time.monotonic()
            await asyncio.to_thread(second.stop)
            took = time.monotonic() - begun
            await _more(load, 30)
        second.reload()
        code = second.attrs["State"]["ExitCode"]
        _judge(
            lines, f"`docker stop` of the busier LLM under load: exit code {code} after {took:.1f} s", load, code == 0
        )


def _judge(lines: Lines, what: str, load: Load, ok: bool = True) -> None:
    lines.add(what, ok and not load.failures and not load.lost_streams, str(load))
    for one in [*load.failures, *load.lost_streams][:5]:
        print(f"        {one.kind}: {one.error[:300]}")


async def _restarted(one: Container) -> bool:
    await asyncio.to_thread(one.reload)
    return bool(one.attrs["RestartCount"])


async def _more(load: Load, count: int) -> None:
    """Waits until so many requests more have ended."""
    wanted = len(load.outcomes) + count

    async def there() -> bool:
        return len(load.outcomes) >= wanted

    await _until(there, 120)


async def _until(check: Any, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if await check():
                return
            await asyncio.sleep(0.2)


def leftovers(client: DockerClient, lines: Lines) -> None:
    """After `down --volumes`."""
    left = [one.name for one in client.containers.list(all=True, filters=PROJECT)]
    left += [one.name for one in client.networks.list(filters=PROJECT)]
    left += [one.name for one in client.volumes.list(filters=PROJECT)]
    lines.add(
        "`docker compose down --volumes` leaves no container, network or volume", not left, ", ".join(left) or "none"
    )
