"""The command lines of a rendered Compose project over TLS, as processes: gateway, two instances, health checks, and
what Prometheus is told. Only addresses and folders are others than in the containers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trustme
import yaml

from deploy.fleet import parse_fleet
from deploy.render.compose import compose
from deploy.render.shipped import shipped_files
from infermesh.client import AsyncClient, MeshError
from tests.kit.children import ROOT, Children, environment, infermesh
from tests.kit.debian import NoProgram, not_here
from tests.kit.mesh import until
from tests.kit.prometheus import Prometheus, prometheus_binary, running_prometheus
from tests.kit.rendering import SITE

DOOR, INSIDE = "mesh.example.com", "instances.mesh.internal"
KEY = "operator"
SERVICES = ("demo-1", "demo-2", "gateway")


class Project:
    """The rendered project in a folder. `words` are a service's, as they are for a process of this machine."""

    def __init__(self, folder: Path) -> None:
        made = compose(parse_fleet((ROOT / "deploy/examples/tls.yaml").read_text()), SITE, shipped_files())
        self.folder, self.files = folder, made.files
        self.services: dict[str, Any] = yaml.safe_load(made.files["compose.yaml"])["services"]
        self.ports = dict(zip(("grpc", "http", "demo-1", "demo-2"), free_ports(4), strict=True))
        authority = trustme.CA()
        for name, host in (("gateway", DOOR), ("instances", INSIDE)):
            at = folder / "tls" / name
            at.mkdir(parents=True)
            one = authority.issue_cert(host)
            one.cert_chain_pems[0].write_to_path(at / "tls.crt")
            one.private_key_pem.write_to_path(at / "tls.key")
            authority.cert_pem.write_to_path(at / "ca.crt")
        secrets = folder / "secrets"
        secrets.mkdir()
        key = {"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "tenant": "ops", "role": "operator"}
        (secrets / "keys.yaml").write_text(json.dumps({"version": 1, "keys": [key]}))
        for name in ("operator.key", "metrics.key"):
            (secrets / name).write_text(KEY)

    def words(self, service: str, of: list[str], registry: str = "") -> list[str]:
        """Mounts become the folders that they are of; what is beyond the container becomes loopback."""
        at = f"127.0.0.1:{self.ports.get(service, self.ports['grpc'])}"
        other = {
            "consul://consul:8500": registry,
            "/run/secrets/": f"{self.folder}/secrets/",
            "0.0.0.0:8000": f"127.0.0.1:{self.ports['http']}",
            **{f"{host}:{port}": at for host in ("0.0.0.0", "127.0.0.1", service) for port in (50050, 50051)},
        }
        binds = [mount for mount in self.services[service]["volumes"] if isinstance(mount, dict)]
        other |= {mount["target"]: str(self.folder / mount["source"]) for mount in binds}
        found = []
        for word in of:
            for inside, here in other.items():
                word = word.replace(inside, here)
            found.append(word)
        return found

    def health(self, service: str) -> subprocess.CompletedProcess[str]:
        told = self.services[service]["healthcheck"]["test"][2:]
        words = infermesh(*self.words(service, told))
        return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60, check=False)

    def prometheus(self) -> Path:
        """Its configuration, with the files of this folder and the gateway's port here."""
        told = yaml.safe_load(self.files["prometheus/prometheus.yaml"])
        told["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s"}
        told["rule_files"] = []
        (job,) = [one for one in told["scrape_configs"] if one["job_name"] == "gateway"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{self.ports['http']}"]}]
        job["authorization"]["credentials_file"] = str(self.folder / "secrets" / "metrics.key")
        (mount,) = [one for one in self.services["prometheus"]["volumes"] if isinstance(one, dict)]
        assert job["tls_config"]["ca_file"] == mount["target"]
        job["tls_config"]["ca_file"] = str(self.folder / mount["source"])
        path = self.folder / "prometheus.yaml"
        path.write_text(yaml.safe_dump({**told, "scrape_configs": [job]}))
        return path


def free_ports(count: int) -> Iterator[int]:
    with contextlib.ExitStack() as held:
        for _ in range(count):
            one = held.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            yield int(one.getsockname()[1])


async def test_the_rendered_lines_serve_over_tls(tmp_path: Path) -> None:
    project = Project(tmp_path)
    ca = str(tmp_path / "tls" / "gateway" / "ca.crt")
    with Children(tmp_path) as children:
        registry = f"mesh://{children.start('registry', '--listen', '127.0.0.1:0', '--insecure').told()['address']}"
        for service in SERVICES:
            verb, *words = project.words(service, project.services[service]["command"], registry)
            children.start(verb, *words, name=service)
        door = f"grpcs://127.0.0.1:{project.ports['grpc']}"
        async with AsyncClient(door, api_key=KEY, ca_file=ca, tls_name=DOOR) as client:

            async def both() -> bool:
                with contextlib.suppress(MeshError):  # it still starts
                    return [one.state for one in await client.instances()] == ["healthy"] * 2
                return False

            await until(both, 60)
            assert (await client.chat("hello", model="demo", max_tokens=2)).text == " w0 w1"
        for service in SERVICES:
            done = await asyncio.to_thread(project.health, service)
            assert done.returncode == 0, f"{service}: {done.stderr}"
        project.services["demo-1"]["healthcheck"]["test"][-1] = DOOR
        assert project.health("demo-1").returncode == 1, "another name is another process"
        try:
            prometheus_binary()
        except NoProgram as why:
            not_here(f"the scrape: {why}")
        with running_prometheus(tmp_path, project.prometheus()) as prometheus:
            await until(lambda: scraped(prometheus), 60)


async def scraped(prometheus: Prometheus) -> bool:
    await asyncio.sleep(0.2)
    with contextlib.suppress(OSError):  # it still starts
        return bool(await asyncio.to_thread(prometheus.values, 'up{job="gateway"} == 1', ""))
    return False
