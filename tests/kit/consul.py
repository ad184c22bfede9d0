"""A real Consul server for tests: found on PATH, or taken from Debian's bullseye release (1.8.7) without root.

with ConsulServer() as consul:
    consul.url, consul.restart_empty(), consul.kill() ...
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.kit.debian import unpacked

ROOT = Path(__file__).resolve().parents[2]


def consul_binary() -> str:
    """Path of a Consul, fetched once into the checkout.

    Raises:
        NoProgram: not on PATH, and this machine's package archive has none.
    """
    return shutil.which("consul") or str(unpacked("consul", ["consul"], suite="bullseye") / "usr" / "bin" / "consul")


class ConsulServer:
    """One or three servers on free ports of 127.0.0.1. Leaves neither processes nor files behind.

    `servers=1` is a dev server that forgets everything when it restarts. `config`: more of Consul's own configuration;
    `https`: a port for it.
    """

    def __init__(self, *, servers: int = 1, config: dict[str, Any] | None = None, https: int = -1) -> None:
        self._count = servers
        self._config = config or {}
        self._https = https
        self._binary = consul_binary()
        self._folder = Path(tempfile.mkdtemp(prefix="infermesh-consul-"))
        self._ports = [_free_ports() for _ in range(servers)]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * servers
        self._agent: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"consul://127.0.0.1:{self.port()}"

    def port(self, index: int = 0) -> int:
        """The HTTP port of a server."""
        return self._ports[index]["http"]

    def __enter__(self) -> ConsulServer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, index: int | None = None) -> None:
        """Starts what does not run and waits until it answers with a leader."""
        wanted = range(self._count) if index is None else [index]
        for one in wanted:
            if self._processes[one] is None:
                self._spawn(one)
        for one in wanted:
            self._wait_ready(one)

    def kill(self, index: int | None = None) -> None:
        """SIGKILL; what it knew stays on disk unless it is the dev server."""
        for one in range(self._count) if index is None else [index]:
            if process := self._processes[one]:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait(10)
                self._processes[one] = None

    def pause(self, index: int = 0) -> None:
        """SIGSTOP: connections stay, nobody answers."""
        if process := self._processes[index]:
            process.send_signal(signal.SIGSTOP)

    def go_on(self, index: int = 0) -> None:
        if process := self._processes[index]:
            process.send_signal(signal.SIGCONT)

    def restart_empty(self) -> None:
        """SIGKILL, then the same address with nothing known."""
        self.kill()
        for one in range(self._count):
            shutil.rmtree(self._folder / f"data-{one}", ignore_errors=True)
        self.start()

    def leader(self) -> int:
        """Index of the server that leads."""
        for one in range(self._count):
            if self._processes[one] is None:
                continue
            with contextlib.suppress(OSError, ValueError):
                host, _, port = str(self.get("/v1/status/leader", one)).rpartition(":")
                if host:
                    return next(i for i in range(self._count) if self._ports[i]["server"] == int(port))
        raise AssertionError("no leader")

    def get(self, path: str, index: int = 0, token: str = "") -> Any:
        return json.loads(self._call("GET", path, None, index, token))

    def put(self, path: str, body: object = None, index: int = 0, token: str = "") -> str:
        """Raises urllib.error.HTTPError for what Consul refuses."""
        return self._call("PUT", path, json.dumps(body).encode() if body is not None else b"", index, token)

    def start_agent(self) -> str:
        """A client agent beside the servers, as every host of a mesh has one. Returns its URL."""
        ports = _free_ports()
        config = {
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "node_name": "agent",
            "ports": {**ports, "https": -1, "dns": -1, "grpc": -1},
            "retry_join": [f"127.0.0.1:{one['serf_lan']}" for one in self._ports],
            "retry_interval": "1s",
            "data_dir": str(self._folder / "data-agent"),
            "disable_update_check": True,
            "log_level": "warn",
        }
        path = self._folder / "agent.json"
        path.write_text(json.dumps(config))
        with (self._folder / "agent.log").open("ab") as log:
            self._agent = subprocess.Popen(
                [self._binary, "agent", "-config-file", str(path)],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                if any(node["Node"] == "agent" for node in self.get("/v1/catalog/nodes")):
                    return f"consul://127.0.0.1:{ports['http']}"
            time.sleep(0.05)
        raise AssertionError(f"the agent did not join: {(self._folder / 'agent.log').read_text()[-2000:]}")

    def kill_agent(self) -> None:
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait(10)
            self._agent = None

    def close(self) -> None:
        self.kill_agent()
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, method: str, path: str, body: bytes | None, index: int, token: str) -> str:
        url = f"http://127.0.0.1:{self.port(index)}{path}"
        request = urllib.request.Request(url, body, {"X-Consul-Token": token} if token else {}, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=10) as reply:
            return str(reply.read().decode())

    def _spawn(self, index: int) -> None:
        ports = self._ports[index]
        config: dict[str, Any] = {
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "ports": {**ports, "https": self._https, "dns": -1, "grpc": -1},
            "performance": {"raft_multiplier": 1},
            "disable_update_check": True,
            "log_level": "warn",
        }
        words = [self._binary, "agent"]
        if self._count == 1:
            words.append("-dev")
        else:
            others = [f"127.0.0.1:{self._ports[i]['serf_lan']}" for i in range(self._count) if i != index]
            config |= {
                "server": True,
                "node_name": f"server-{index}",
                "bootstrap_expect": self._count,
                "retry_join": others,
                "retry_interval": "1s",
                "data_dir": str(self._folder / f"data-{index}"),
            }
        path = self._folder / f"server-{index}.json"
        path.write_text(json.dumps(config | self._config))
        with (self._folder / f"server-{index}.log").open("ab") as log:
            self._processes[index] = subprocess.Popen(
                [*words, "-config-file", str(path)],
                cwd=self._folder,  # a dev server reads the folder `services` where it stands
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _wait_ready(self, index: int, timeout_s: float = 40.0) -> None:
        process = self._processes[index]
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if process is None or process.poll() is not None:
                raise AssertionError(f"Consul ended: {self._log(index)}")
            with contextlib.suppress(OSError, ValueError):
                if self.get("/v1/status/leader", index) and self._listed(index):
                    return
            time.sleep(0.05)
        raise AssertionError(f"Consul is not ready after {timeout_s} s: {self._log(index)}")

    def _listed(self, index: int) -> bool:
        """Whether the server has put itself into the catalogue; before that it answers, but with errors to come."""
        if "acl" in self._config:
            return True  # it shows nothing without a token
        return bool(self.get("/v1/health/service/consul?stale", index))

    def _log(self, index: int) -> str:
        return (self._folder / f"server-{index}.log").read_text(errors="replace")[-2000:]


def _free_ports() -> dict[str, int]:
    return dict(zip(("http", "server", "serf_lan", "serf_wan"), free_ports(4), strict=True))


def free_ports(count: int) -> list[int]:
    """Ports for those who cannot be told to take any. Not of the range from which the kernel gives every outgoing
    connection one: such a port could be gone when it is bound, or bound again after a restart."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            holder = stack.enter_context(socket.socket())
            port = random.randrange(20_000, 32_000)
            with contextlib.suppress(OSError):
                holder.bind(("127.0.0.1", port))
                found.append(port)
        return found
