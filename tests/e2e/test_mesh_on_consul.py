"""The whole mesh on a real Consul: every process a child, two scripted LLMs, the real MiniLM for embedding and rerank.

The numbers that the tests measure are printed: `pytest -s`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infermesh.client import AsyncClient
from tests.kit.children import Child, Children, ask
from tests.kit.consul import ConsulServer
from tests.kit.embedding import EXPORTS, MODEL
from tests.kit.mesh import until
from tests.kit.traffic import traffic

pytestmark = [pytest.mark.consul, pytest.mark.slow, pytest.mark.timeout(300)]

SPEEDS = {"llm-fast": (20000.0, 5.0), "llm-slow": (5000.0, 20.0)}  # prompt tokens a second, milliseconds a step
ENCODERS = ("embedding", "rerank")
FLEET = {*SPEEDS, *ENCODERS}
FIELDS = [
    *("id", "kind", "model", "address", "pid", "state", "tier", "device", "running", "waiting", "kv_used_ratio"),
    *("speed", "weight", "why", "since_s", "rejected_reason", "conditions"),
]
GONE_S = 2.0
BACK_S = 5.0


@dataclass
class ConsulMesh:
    """`url`: of the registry. Tests leave the fleet as they found it."""

    consul: ConsulServer
    children: Children
    gateway: Child
    instances: dict[str, Child]

    @property
    def url(self) -> str:
        return self.consul.url

    @property
    def grpc(self) -> str:
        return str(self.gateway.told()["grpc"])

    @property
    def http(self) -> str:
        return str(self.gateway.told()["http"])

    def llm(self, name: str, speed: tuple[float, float], *flags: str, model: str = "chat") -> Child:
        words = ("--engine", "scripted", "--model", model, "--instance-id", name, "--registry", self.url, *flags)
        pace = ("--prefill-tps", str(speed[0]), "--step-ms", str(speed[1]))
        self.instances[name] = self.children.start("llm", *words, *pace, "--grace-s", "10", name=name)
        return self.instances[name]

    def cli(self, *words: str) -> str:
        return ask(*words, "--gateway", self.grpc)

    def listed(self) -> dict[str, dict[str, Any]]:
        """As a script sees them: `infermesh instances --json`."""
        rows = json.loads(self.cli("instances", "--json"))
        return {row["id"]: row for row in rows}

    def in_consul(self) -> set[str]:
        """Ids that Consul lists as passing."""
        found = set()
        for kind in ("llm", *ENCODERS):
            listing = self.consul.get(f"/v1/health/service/infermesh-{kind}?passing")
            found |= {item["Service"]["ID"] for item in listing}
        return found


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulMesh]:
    with ConsulServer() as consul, Children(tmp_path_factory.mktemp("mesh")) as children:
        address = ("--registry", consul.url)
        doors = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--grace-s", "5")
        mesh = ConsulMesh(consul, children, children.start("gateway", *address, *doors), {})
        for kind in ENCODERS:
            words = (*address, "--instance-id", kind, "--export-dir", str(EXPORTS), "--grace-s", "5")
            scorer = ("--scorer", "bi-encoder") if kind == "rerank" else ()
            mesh.instances[kind] = children.start(kind, *words, *scorer)
        for name, speed in SPEEDS.items():
            mesh.llm(name, speed)
        for child in (mesh.gateway, *mesh.instances.values()):
            child.told()
        yield mesh


@pytest.fixture
async def client(mesh: ConsulMesh) -> Any:
    """A client of a mesh whose fleet is whole."""
    async with AsyncClient(mesh.grpc) as client:
        await until(lambda: _whole(client), 15)
        yield client


async def _states(client: AsyncClient) -> dict[str, str]:
    return {instance.id: instance.state for instance in await client.instances()}


async def _whole(client: AsyncClient) -> bool:
    states = await _states(client)
    return all(states.get(id) == "healthy" for id in FLEET)


async def test_all_are_listed_with_their_speeds(mesh: ConsulMesh, client: AsyncClient) -> None:
    rows = await asyncio.to_thread(mesh.listed)
    assert set(rows) == FLEET
    for id, row in rows.items():
        assert list(row) == FIELDS
        assert row["state"] == "healthy" and row["rejected_reason"] == "" and row["tier"] == "primary"
        assert row["address"] == mesh.instances[id].address and row["weight"] == 1.0 and row["device"]
        assert row["running"] == 0 and row["waiting"] == 0
        assert row["pid"] is None, "only what `infermesh up` started here has one"
    assert {row["kind"] for row in rows.values()} == {"llm", *ENCODERS}
    for id, (prefill, step) in SPEEDS.items():
        speed = rows[id]["speed"]
        assert (speed["prefill_tps"], speed["step_ms"], speed["source"]) == (prefill, step, "declared")
        assert rows[id]["kv_used_ratio"] == 0.0 and rows[id]["model"] == "chat"
    for id in ENCODERS:
        assert rows[id]["speed"]["source"] == "observed" and rows[id]["speed"]["tokens_per_s"] > 0
        assert rows[id]["model"] == MODEL


async def test_the_table_is_for_people(mesh: ConsulMesh, client: AsyncClient) -> None:
    head, *lines = (await asyncio.to_thread(mesh.cli, "instances")).splitlines()
    assert head.split() == ["ID", "KIND", "MODEL", "STATE", "TIER", "DEVICE", "RUN", "WAIT", "KV", "ADDRESS"]
    assert [line.split()[0] for line in lines] == sorted(FLEET)
    at = head.index("STATE")
    assert all(line[at:].startswith("healthy") for line in lines), "columns stand below each other"
    assert max(map(len, lines)) <= 120


async def test_a_killed_one_is_gone_within_two_seconds(mesh: ConsulMesh, client: AsyncClient) -> None:
    """Not only out of work, which takes a moment, but out of the list, as the registry has found it dead too."""
    took: list[float] = []
    for number in range(5):
        name = f"victim-{number}"
        victim = mesh.llm(name, (1e6, 1.0), model="victim")
        await until(lambda name=name: _is(client, name, "healthy"), 20)
        await asyncio.sleep(random.uniform(0, 1.5))  # anywhere between two of Consul's checks
        victim.popen.kill()
        killed = time.monotonic()
        await until(lambda name=name: _is(client, name, None), 10)
        took.append(time.monotonic() - killed)
        victim.kill()
        del mesh.instances[name]
    print("\nkilled -> gone from the list [s]:", *(f"{seconds:.2f}" for seconds in took))
    assert set(await asyncio.to_thread(mesh.listed)) == FLEET
    assert max(took) < GONE_S


async def _is(client: AsyncClient, id: str, state: str | None) -> bool:
    return (await _states(client)).get(id) == state


async def test_a_hostile_entry_is_shown_and_not_dialled(mesh: ConsulMesh, client: AsyncClient) -> None:
    meta = mesh.consul.get("/v1/agent/service/llm-fast")["Meta"]
    entry = {"Name": "infermesh-llm", "ID": "evil", "Address": "169.254.169.254", "Port": 80, "Meta": meta}
    mesh.consul.put("/v1/agent/service/register", entry)
    try:
        await until(lambda: _is(client, "evil", "rejected"))
        row = (await asyncio.to_thread(mesh.listed))["evil"]
        assert (
            row["address"] == "169.254.169.254:80" and row["kind"] == "llm" and "link-local" in row["rejected_reason"]
        )
        table = await asyncio.to_thread(mesh.cli, "instances")
        assert f"evil: {row['rejected_reason']}" in table
        for _ in range(10):
            answer = await client.chat("hello", model="chat", max_tokens=1)
            assert answer.served.instance_id in SPEEDS
    finally:
        mesh.consul.put("/v1/agent/service/deregister/evil")
    await until(lambda: _is(client, "evil", None))


async def test_consul_restarted_empty(mesh: ConsulMesh, client: AsyncClient) -> None:
    async with traffic(mesh.grpc, mesh.http, chat="chat", encoder=MODEL) as load:
        await asyncio.sleep(1)
        await asyncio.to_thread(mesh.consul.restart_empty)
        empty = time.monotonic()
        while mesh.in_consul() != FLEET:
            assert time.monotonic() - empty < 20, mesh.in_consul()
            assert await _whole(client), f"the gateway keeps whom it can talk to: {await _states(client)}"
            await asyncio.sleep(0.05)
        back = time.monotonic() - empty
        await asyncio.sleep(2)
        assert await _whole(client)
    print(f"\nConsul answers, empty -> all are registered again: {back:.2f} s; {load}")
    assert back < BACK_S and not load.failures and not load.lost_streams


async def test_consul_away(mesh: ConsulMesh, client: AsyncClient) -> None:
    async with traffic(mesh.grpc, mesh.http, chat="chat", encoder=MODEL) as load:
        await asyncio.sleep(1)
        await asyncio.to_thread(mesh.consul.kill)
        for _ in range(15):
            await asyncio.sleep(1)
            assert await _whole(client)
        await asyncio.to_thread(mesh.consul.start)
        await until(lambda: mesh.in_consul() == FLEET, 20)
        await asyncio.sleep(1)
    print(f"\nConsul away for 15 s: {load}")
    assert not load.failures and not load.lost_streams


async def test_one_of_two_llms_is_killed(mesh: ConsulMesh, client: AsyncClient) -> None:
    """Whoever had nothing yet is served by the other; a stream that had begun may end with STREAM_LOST and no other."""
    name = "llm-slow"
    async with traffic(mesh.grpc, mesh.http, chat="chat", encoder=MODEL, chats=4, tokens=20) as load:
        for _ in range(3):
            await until(lambda: _whole(client), 20)
            await asyncio.sleep(random.uniform(1, 2))
            mesh.instances[name].kill()
            await asyncio.sleep(1)
            mesh.llm(name, SPEEDS[name])
    print(f"\none of two LLMs killed three times: {load}")
    assert not load.failures
    await until(lambda: _whole(client), 20)


async def test_a_drained_one_finishes_its_stream(mesh: ConsulMesh, client: AsyncClient) -> None:
    leaver = mesh.llm("leaver", (1e6, 30.0), model="leaving")
    await until(lambda: _is(client, "leaver", "healthy"), 20)
    stream = client.chat_stream("hello", model="leaving", max_tokens=150)
    last = await anext(stream)
    told = await asyncio.to_thread(mesh.cli, "drain", "leaver")
    assert told == "leaver is leaving; 1 requests are being finished\n"
    async for chunk in stream:
        last = chunk
    assert last.so_far.text == "".join(f" w{number}" for number in range(150))
    await until(lambda: leaver.ended)
    assert leaver.popen.returncode == 0
    await until(lambda: _is(client, "leaver", None), 8)  # a loss might be doubted for 10 s
    assert "leaver" not in mesh.in_consul() and set(await asyncio.to_thread(mesh.listed)) == FLEET
    del mesh.instances["leaver"]


async def test_with_access_control(tmp_path: Path) -> None:
    """Every process reads its token from a file; one with a wrong token is told so."""
    master, good, bad = (str(uuid.uuid4()) for _ in range(3))
    tokens = {"master": master, "agent": master}
    acl = {"enabled": True, "default_policy": "deny", "tokens": tokens}
    with ConsulServer(config={"acl": acl, "primary_datacenter": "dc1"}) as consul, Children(tmp_path) as children:
        await until(lambda: _answers(consul, master), 20)
        rules = 'service_prefix "blue-" { policy = "write" } node_prefix "" { policy = "read" }'
        consul.put("/v1/acl/policy", {"Name": "mesh", "Rules": rules}, token=master)
        consul.put("/v1/acl/token", {"SecretID": good, "Policies": [{"Name": "mesh"}]}, token=master)
        files = {name: tmp_path / name for name in ("good", "bad")}
        files["good"].write_text(f"{good}\n")
        files["bad"].write_text(f"{bad}\n")

        def registry(name: str) -> tuple[str, ...]:
            return ("--registry", consul.url, "--registry-prefix", "blue", "--registry-token-file", str(files[name]))

        doors = ("--grpc", "127.0.0.1:0", "--http", "")
        scripted = ("--engine", "scripted", "--model", "chat")
        gateway = children.start("gateway", *registry("good"), *doors)
        instance = children.start("llm", *scripted, *registry("good"), "--instance-id", "a")
        encoder = children.start("embedding", *registry("good"), "--instance-id", "e", "--export-dir", str(EXPORTS))
        strangers = [
            children.start("llm", *scripted, *registry("bad"), name="stranger"),
            children.start("gateway", *registry("bad"), *doors, name="strange-gateway"),
        ]
        for child in (gateway, instance, encoder):
            child.told()
        async with AsyncClient(gateway.told()["grpc"]) as client:
            await until(lambda: _are(client, {"a": "healthy", "e": "healthy"}), 20)
            assert (await client.chat("hello", model="chat", max_tokens=2)).text == " w0 w1"
        for stranger in strangers:
            await until(lambda stranger=stranger: stranger.ended, 30)
            assert stranger.popen.returncode == 2
            assert "cannot be registered: Consul refuses the token" in stranger.text()
            assert bad not in stranger.text()


async def _are(client: AsyncClient, wanted: dict[str, str]) -> bool:
    return await _states(client) == wanted


def _answers(consul: ConsulServer, token: str) -> bool:
    try:
        return bool(consul.get("/v1/acl/policies", token=token))
    except OSError:
        return False
