"""A mesh over TLS: doors, instances, registry, command line; who is not vouched for; a renewed certificate."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import aiohttp
import pytest
import trustme

from infermesh.client import AsyncClient, AsyncDirectClient, Client, MeshError
from registry.address import open_registry
from services.chassis import certificates
from services.chassis.certificates import Certificate
from tests.kit.children import Children, environment, infermesh
from tests.kit.consul import ConsulServer
from tests.kit.fake_instance import fake_instance
from tests.kit.mesh import TestMesh, running_mesh, until

NAME = "mesh.internal"


def issue(folder: Path, authority: trustme.CA, name: str, *hosts: str) -> tuple[Path, Path]:
    """(certificate, key) as files, replaced in one step each, as those do who renew them."""
    made = authority.issue_cert(*hosts)
    files = folder / f"{name}.pem", folder / f"{name}.key"
    for file, content in zip(files, (made.cert_chain_pems[0].bytes(), made.private_key_pem.bytes()), strict=True):
        (folder / "new").write_bytes(content)
        (folder / "new").replace(file)
    return files


def flags(cert: Path, key: Path) -> tuple[str, ...]:
    return ("--tls-cert-file", str(cert), "--tls-key-file", str(key))


async def said(mesh: TestMesh, ca: Path) -> str:
    async with AsyncClient(f"grpcs://{mesh.address}", ca_file=str(ca), timeout=10) as client:
        return (await client.chat("hello", model="chat", max_tokens=2)).text


async def said_by_rest(mesh: TestMesh, ca: Path) -> str:
    trusted = ssl.create_default_context(cafile=str(ca))
    body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"https://{mesh.http}/v1/chat/completions", json=body, ssl=trusted) as reply:
            assert reply.status == 200
            return str((await reply.json())["choices"][0]["message"]["content"])


async def verb(*words: str, ca: Path, code: int | None = 0) -> str:
    """What it prints, on standard error too where `code` is not 0. None: however it ends."""
    env = environment(GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=str(ca))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*infermesh(*words), env=env, stdout=pipe, stderr=pipe)
    out, err = await process.communicate()
    assert code in (None, process.returncode), f"{out.decode()}\n{err.decode()}"
    return (out if code == 0 else out + err).decode()


async def test_every_hop_over_tls_and_nobody_in_who_is_not_vouched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "LOOK_S", 0.2)
    authority, stranger = trustme.CA(), trustme.CA()
    ca, other_ca = tmp_path / "ca.pem", tmp_path / "other-ca.pem"
    authority.cert_pem.write_to_path(ca)
    stranger.cert_pem.write_to_path(other_ca)
    door = issue(tmp_path, authority, "door", "127.0.0.1")
    node = issue(tmp_path, authority, "node", NAME)
    false = issue(tmp_path, stranger, "false", NAME)
    settings = {"tls_cert_file": door[0], "tls_key_file": door[1], "http": "127.0.0.1:0"}
    trusting = {"instances_ca_file": ca, "instances_tls_name": NAME}
    async with running_mesh(tmp_path, {}, **settings, **trusting) as mesh:
        await mesh.start("a", *flags(*node))
        await mesh.start("false", *flags(*false))
        async with AsyncClient(f"grpcs://{mesh.address}", ca_file=str(ca)) as client, fake_instance("clear") as clear:
            registry = open_registry(mesh.registry)
            await registry.register(clear.endpoint)

            async def states() -> dict[str, str]:
                return {one.id: one.state for one in await client.instances()}

            async def settled() -> bool:
                found = await states()
                return found.get("a") == "healthy" and {"false", "clear"} <= set(found)

            await until(settled, 20)
            for _ in range(20):  # where one in three would go
                assert (await client.chat("hello", model="chat", max_tokens=1)).served.instance_id == "a"
            assert "healthy" not in {(await states())[id] for id in ("false", "clear")} and not clear.links
            await registry.close()

        assert await said(mesh, ca) == await said_by_rest(mesh, ca) == " w0 w1"
        whom = {"ca_file": str(ca), "instances_ca_file": str(ca), "timeout": 30}
        async with AsyncDirectClient(f"grpcs://{mesh.address}", **whom) as direct:
            assert (await direct.chat("hello", model="chat", max_tokens=2)).text == " w0 w1"
        for wrong in (f"grpcs://{mesh.address}", mesh.address):
            with pytest.raises(MeshError), Client(wrong, ca_file=str(other_ca), timeout=5) as client:
                client.chat("hello", model="chat")
        gateway = f"grpcs://{mesh.address}"
        assert "serving" in await verb("health", gateway, ca=ca)
        assert "serving" in await verb(
            *("health", f"grpcs://{mesh.instances['a'].address}", "--ca-file", str(ca), "--tls-name", NAME), ca=other_ca
        )
        told = ("--instances-ca-file", str(ca), "--instances-tls-name", NAME, "--calibration", str(tmp_path / "c.yaml"))
        out = await verb("calibrate", "a", "--quick", "--gateway", gateway, *told, ca=ca, code=None)
        assert "decode 8" in out, out  # it measured itself; whether the numbers fit is the machine's affair
        out = await verb("bench", "--target", gateway, "-m", "chat", "--generate", "rps=20,requests=4", "--json", ca=ca)
        assert json.loads(out)["completed"] == 4

        issue(tmp_path, stranger, "door", "127.0.0.1")

        async def renewed() -> bool:
            try:
                return await said(mesh, other_ca) == await said_by_rest(mesh, other_ca)
            except (MeshError, aiohttp.ClientError):
                return False

        await until(renewed, 30)
        door[1].write_text("no key")
        await asyncio.sleep(0.6)
        assert await renewed(), "what cannot be used changes nothing"


async def test_the_embedded_registry_over_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    files = issue(tmp_path, authority, "registry", "127.0.0.1")
    with Children(tmp_path) as children:
        registry = children.start("registry", "--listen", "127.0.0.1:0", *flags(*files))
        shared = ("--registry", f"mesh://{registry.told()['address']}", "--registry-ca-file", str(ca))
        children.start("llm", "--engine", "scripted", "--model", "chat", "--listen", "127.0.0.1:0", *shared)
        gateway = children.start("gateway", "--grpc", "127.0.0.1:0", "--http", "", *shared)
        async with AsyncClient(gateway.told()["grpc"], timeout=30) as client:

            async def healthy() -> bool:
                return [one.state for one in await client.instances()] == ["healthy"]

            await until(healthy, 20)


@pytest.mark.parametrize(("cert", "key", "why"), [(b"no", b"no", "--tls-cert-file"), (None, None, "No such file")])
async def test_a_certificate_that_cannot_be_used_is_refused_at_the_start(
    tmp_path: Path, cert: bytes | None, key: bytes | None, why: str
) -> None:
    files = tmp_path / "c.pem", tmp_path / "c.key"
    for file, content in zip(files, (cert, key), strict=True):
        if content is not None:
            file.write_bytes(content)
    out = await verb("gateway", "--grpc", "127.0.0.1:0", "--http", "", *flags(*files), ca=files[0], code=2)
    assert why in out
    half = await verb("gateway", "--grpc", "127.0.0.1:0", "--tls-cert-file", str(files[0]), ca=files[0], code=2)
    assert "one is nothing without the other" in half


def test_files_that_do_not_belong_together_are_told_in_words(tmp_path: Path) -> None:
    one, other = (issue(tmp_path, trustme.CA(), name, "localhost") for name in ("one", "other"))
    with pytest.raises(ValueError, match="the key is not the certificate's"):
        Certificate(one[0], other[1])
    with pytest.raises(ValueError, match="no PEM certificate and key"):
        Certificate(one[1], one[0])


@pytest.mark.consul
async def test_consul_finds_healthy_who_serves_over_tls(tmp_path: Path) -> None:
    """Its check is over TLS too; in the clear it would be critical within a second."""
    files = issue(tmp_path, trustme.CA(), "node", NAME)
    with ConsulServer() as consul, Children(tmp_path) as children:
        words = ("--model", "chat", "--listen", "127.0.0.1:0", "--instance-id", "a", "--registry", consul.url)
        children.start("llm", "--engine", "scripted", *words, *flags(*files))
        url = f"http://127.0.0.1:{consul.port()}/v1/agent/checks"  # what it just saw; the catalogue hears of it later

        async def status() -> set[tuple[str, str]]:
            async with aiohttp.ClientSession() as session, session.get(url) as reply:
                checks = (await reply.json()).values()
            return {(check["Status"], check["Output"]) for check in checks}

        async def asked() -> bool:
            found = await status()
            return bool(found) and all(output for _, output in found)

        await until(asked, 20)
        assert {state for state, _ in await status()} == {"passing"}, await status()
