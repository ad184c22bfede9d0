"""What only Consul can do to us: bad answers, leader and quorum loss, tokens, TLS, churn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from registry.address import open_registry
from registry.consul import ConsulRegistry, ConsulSettings, Tls
from registry.endpoint import Endpoint
from registry.port import Registry, RegistryError
from tests.kit.consul import ConsulServer, consul_binary, free_ports
from tests.kit.debian import NoProgram, not_here
from tests.kit.fake_consul import FakeConsul, Handler
from tests.kit.mesh import until
from tests.kit.registered_instance import health_server
from tests.kit.registries import LEAVING_S, Watching, first_seen, ids


def endpoint(id: str, port: int = 1) -> Endpoint:
    return Endpoint(id, "llm", "127.0.0.1", port, "m", incarnation=secrets.randbits(64))


@contextlib.contextmanager
def real(**options: Any) -> Iterator[ConsulServer]:
    try:
        consul_binary()
    except NoProgram as error:
        not_here(error)
    with ConsulServer(**options) as server:
        yield server


@contextlib.asynccontextmanager
async def watched(registry: Registry, *kinds: str) -> AsyncIterator[Watching]:
    watching = Watching(registry, kinds)
    try:
        yield watching
    finally:
        await watching.close()
        await registry.close()


@contextlib.asynccontextmanager
async def healthy() -> AsyncIterator[int]:
    server, port = health_server()
    await server.start()
    yield port
    await server.stop(0)


# -- a Consul that misbehaves (a fake: the real one cannot be told to) -----------------------------------------------


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakeConsul, int]]:
    made = FakeConsul()
    app = web.Application()
    app.router.add_get("/v1/health/service/{name}", made.health)
    app.router.add_put("/v1/agent/service/register", made.put)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield made, runner.addresses[0][1]
    await runner.cleanup()


async def _server_error(_: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text="rpc error: EOF")


async def _too_many(_: web.Request) -> web.StreamResponse:
    return web.Response(status=429, text="slow down")


async def _forbidden(_: web.Request) -> web.StreamResponse:
    return web.Response(status=403, text="ACL not found")


async def _filtered(_: web.Request) -> web.StreamResponse:
    return web.json_response([], headers={"X-Consul-Index": "1", "X-Consul-Results-Filtered-By-ACLs": "true"})


async def _no_json(_: web.Request) -> web.StreamResponse:
    return web.Response(text="[" * 100_000, headers={"X-Consul-Index": "1"})


async def _no_index(_: web.Request) -> web.StreamResponse:
    return web.json_response([])


async def _an_object(_: web.Request) -> web.StreamResponse:
    return web.json_response({}, headers={"X-Consul-Index": "1"})


async def _half_a_body(request: web.Request) -> web.StreamResponse:
    reply = web.StreamResponse(headers={"X-Consul-Index": "1", "Content-Length": "1000"})
    await reply.prepare(request)
    await reply.write(b"[")
    assert request.transport
    request.transport.close()
    return reply


@pytest.mark.parametrize(
    "bad",
    [_server_error, _too_many, _forbidden, _filtered, _no_json, _no_index, _an_object, _half_a_body],
    ids=lambda bad: bad.__name__.strip("_"),
)
async def test_bad_answers_leave_the_last_known_set(fake: tuple[FakeConsul, int], bad: Handler) -> None:
    consul, port = fake
    async with watched(ConsulRegistry(ConsulSettings(port=port)), "llm") as watching:
        await watching.until(lambda s: ids(s) == {"a", "b"})
        consul.answer = bad
        await watching.until(lambda s: s.stale)
        before = len(consul.queries)
        await asyncio.sleep(2)
        assert len(consul.queries) - before <= 20, "backs off"
        assert ids(watching.last) == {"a", "b"}
        consul.answer = consul.fine
        await watching.until(lambda s: not s.stale and ids(s) == {"a", "b"})


async def test_a_body_that_never_ends_is_cut_off(fake: tuple[FakeConsul, int]) -> None:
    consul, port = fake
    released = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"X-Consul-Index": "1"})
        await reply.prepare(request)
        with contextlib.suppress(ConnectionError):
            while not released.is_set():
                await reply.write(b" ")
                await asyncio.sleep(0.05)
        return reply

    async with watched(ConsulRegistry(ConsulSettings(port=port, wait_s=0.5, timeout_s=1)), "llm") as watching:
        await watching.until(lambda s: ids(s) == {"a", "b"})
        consul.answer = endless
        await watching.until(lambda s: s.stale and ids(s) == {"a", "b"})
        consul.answer = consul.fine
        await watching.until(lambda s: not s.stale)
        released.set()


async def test_no_answer_at_all_gives_an_empty_stale_set_first(fake: tuple[FakeConsul, int]) -> None:
    consul, port = fake

    async def silent(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(4)
        return web.Response()

    consul.answer = silent
    async with watched(ConsulRegistry(ConsulSettings(port=port)), "llm") as watching:
        await watching.until(lambda s: s.stale and not s.entries)


async def test_an_index_that_goes_backwards_is_asked_anew_and_nothing_is_dropped(fake: tuple[FakeConsul, int]) -> None:
    consul, port = fake
    async with watched(ConsulRegistry(ConsulSettings(port=port)), "llm") as watching:
        await watching.until(lambda s: ids(s) == {"a", "b"})
        consul.known, consul.index = [], 7
        await watching.until(lambda s: s.young)
        backwards = next(n for n, (_, query) in enumerate(consul.queries) if query.get("index") == "100")
        await until(lambda: any("index" not in query for _, query in consul.queries[backwards + 1 :]), 10)
        consul.known, consul.index = ["a", "b", "c"], 9
        await watching.until(lambda s: ids(s) == {"a", "b", "c"} and not s.young)
        assert all({"a", "b"} <= ids(s) for _, s in watching.seen)


async def test_every_query_allows_stale_reads_and_waits_within_its_deadline(fake: tuple[FakeConsul, int]) -> None:
    consul, port = fake
    async with watched(ConsulRegistry(ConsulSettings(port=port)), "llm") as watching:
        await watching.until(lambda s: len(s.entries) == 2)
        await until(lambda: len(consul.queries) > 1, 10)
    assert all("stale" in query and "passing" not in query for _, query in consul.queries)
    assert consul.queries[-1][1]["wait"] == "4000ms"


async def test_an_index_that_churns_makes_no_storm(fake: tuple[FakeConsul, int]) -> None:
    consul, port = fake

    async def churning(request: web.Request) -> web.StreamResponse:
        consul.index += 1
        return await consul.fine(request)

    consul.answer = churning
    async with watched(ConsulRegistry(ConsulSettings(port=port)), "llm") as watching:
        await watching.until(lambda s: len(s.entries) == 2)
        begun, before = time.monotonic(), len(consul.queries)
        await asyncio.sleep(3)
        assert len(consul.queries) - before <= 5 + 3 * (time.monotonic() - begun), "a burst, then three a second"
        assert len(watching.seen) == 1, "nothing changed, so nothing is said"


@pytest.mark.parametrize("status", [400, 403, 405])
async def test_a_refusal_for_good_is_told(fake: tuple[FakeConsul, int], status: int) -> None:
    consul, port = fake
    consul.put_status = status
    registry = ConsulRegistry(ConsulSettings(port=port))
    with pytest.raises(RegistryError, match="refuses"):
        await registry.register(endpoint("a"))
    await registry.close()


# -- real ones -------------------------------------------------------------------------------------------------------


@pytest.mark.consul
async def test_usable_as_soon_as_registered_and_critical_when_not_served() -> None:
    with real() as consul:
        async with watched(open_registry(consul.url), "llm") as watching:
            await watching.until(lambda s: not s.stale)
            mine = open_registry(consul.url)
            begun = time.monotonic()
            await mine.register(endpoint("nobody-there"))
            await watching.until(lambda s: bool(s.entries))
            usable = time.monotonic() - begun
            assert ids(first_seen(watching, "nobody-there")), "before Consul has looked"
            # Nobody serves there: Consul's own check says so within its interval.
            await watching.until(lambda s: not ids(s) and len(s.entries) == 1)
            print(f"usable after {usable:.3f} s, critical after {time.monotonic() - begun:.2f} s")
            await mine.renew(replace(endpoint("nobody-there"), weight=2.0))
            await asyncio.sleep(0.3)
            assert not ids(watching.last), "a renewal does not make a dead instance good"
            await mine.close()


@pytest.mark.consul
async def test_flapping_fifty_times_a_second_makes_no_storm() -> None:
    with real() as consul:
        async with watched(open_registry(consul.url), "llm") as watching:
            await watching.until(lambda s: not s.stale)
            mine = ConsulRegistry(ConsulSettings(port=consul.port(), reassert_s=60))
            flapping = endpoint("a")
            await mine.register(flapping)
            begun = time.monotonic()
            while time.monotonic() < begun + 3:
                await mine.renew(replace(flapping, weight=1 + secrets.randbelow(100)))
                await asyncio.sleep(0.02)
            assert len(watching.seen) <= 6 + 3 * (time.monotonic() - begun)
            await mine.close()


@pytest.mark.consul
@pytest.mark.slow
async def test_leader_and_quorum_loss_cost_nothing_that_is_known() -> None:
    with real(servers=3) as consul:
        leader = consul.leader()
        ours = next(one for one in range(3) if one != leader)
        url = f"consul://127.0.0.1:{consul.port(ours)}"
        async with watched(open_registry(url), "llm") as watching, healthy() as port:
            mine = open_registry(url)
            await mine.register(endpoint("a", port))
            await mine.register(endpoint("b", port))
            await watching.until(lambda s: ids(s) == {"a", "b"})
            known_from = len(watching.seen)
            await asyncio.to_thread(consul.kill, leader)
            await asyncio.sleep(6)  # a new leader is elected
            await watching.until(lambda s: not s.stale)
            await mine.register(endpoint("c", port))
            await watching.until(lambda s: ids(s) == {"a", "b", "c"})
            other = next(one for one in range(3) if one not in (leader, ours))
            await asyncio.to_thread(consul.kill, other)
            await watching.until(lambda s: s.stale)
            assert ids(watching.last) == {"a", "b", "c"}
            await asyncio.to_thread(consul.start)
            back = time.monotonic()
            await watching.until(lambda s: not s.stale and ids(s) == {"a", "b", "c"})
            print(f"quorum back -> fresh {time.monotonic() - back:.2f} s")
            assert all({"a", "b"} <= ids(s, passing=False) for _, s in watching.seen[known_from:])
            await mine.close()


@pytest.mark.consul
async def test_tokens_and_token_files(tmp_path: Path) -> None:
    master = "b1bc3fd7-5d4c-4b2f-8c0e-1d1f1c9f0001"
    acl = {"enabled": True, "default_policy": "deny", "tokens": {"master": master, "agent": master}}
    with real(config={"acl": acl, "primary_datacenter": "dc1"}) as consul:
        await _until_acl_is_up(consul, master)
        rules = 'service_prefix "infermesh-" { policy = "write" } node_prefix "" { policy = "read" }'
        consul.put("/v1/acl/policy", {"Name": "mesh", "Rules": rules}, token=master)
        told = consul.put("/v1/acl/token", {"Policies": [{"Name": "mesh"}]}, token=master)
        token = json.loads(told)["SecretID"]
        bare = open_registry(consul.url)
        with pytest.raises(RegistryError, match="token"):
            await bare.register(endpoint("a"))
        await bare.close()
        file = tmp_path / "token"
        file.write_text(f"{secrets.token_hex(8)}\n")
        mine = open_registry(consul.url, token_file=str(file))
        async with watched(open_registry(consul.url, token_file=str(file)), "llm") as watching, healthy() as port:
            await watching.until(lambda s: s.stale)
            with pytest.raises(RegistryError, match="token"):
                await mine.register(endpoint("a", port))
            file.write_text(f"{token}\n")  # rotated
            await mine.register(endpoint("a", port))
            await watching.until(lambda s: ids(s) == {"a"} and not s.stale)
            await mine.deregister("a")
            await watching.until(lambda s: not s.entries, LEAVING_S)
        await mine.close()


async def _until_acl_is_up(consul: ConsulServer, master: str) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError):
            if consul.get("/v1/acl/policies", token=master):
                return
        await asyncio.sleep(0.1)
    raise AssertionError("ACLs did not come up")


@pytest.mark.consul
async def test_tls_with_client_certificates(tmp_path: Path) -> None:
    _make_certificates(tmp_path)
    folder = {key: str(tmp_path / name) for key, name in _TLS_FILES.items()}
    (port,) = free_ports(1)
    config = {
        "verify_incoming_https": True,
        "ca_file": folder["ca"],
        "cert_file": folder["cert"],
        "key_file": folder["key"],
        "addresses": {"https": "127.0.0.1"},
    }
    with real(config=config, https=port):
        url = f"consuls://127.0.0.1:{port}"
        good = Tls(folder["ca"], folder["client-cert"], folder["client-key"])
        async with watched(open_registry(url, tls=good), "llm") as watching, healthy() as served:
            mine = open_registry(url, tls=replace(good, ca_file=None, verify=False))
            await mine.register(endpoint("a", served))
            await watching.until(lambda s: ids(s) == {"a"})
            await mine.close()
        for bad in (Tls(folder["ca"]), replace(good, ca_file=None)):
            async with watched(open_registry(url, tls=bad), "llm") as watching:
                await watching.until(lambda s: s.stale and not s.entries)


def _make_certificates(folder: Path) -> None:
    with contextlib.suppress(NoProgram):
        for words in (["ca", "create"], ["cert", "create", "-server"], ["cert", "create", "-client"]):
            subprocess.run([consul_binary(), "tls", *words], cwd=folder, check=True, capture_output=True)


_TLS_FILES = {
    "ca": "consul-agent-ca.pem",
    "cert": "dc1-server-consul-0.pem",
    "key": "dc1-server-consul-0-key.pem",
    "client-cert": "dc1-client-consul-0.pem",
    "client-key": "dc1-client-consul-0-key.pem",
}
