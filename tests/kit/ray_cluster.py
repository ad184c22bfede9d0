"""A Ray cluster of several nodes on this machine, each at a loopback address of its own, as `ray start` makes them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_S = 120.0
STORE = 80 << 20  # bytes; nothing is put there


def marked(mark: str) -> list[int]:
    """The living processes that carry the mark in their environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            environ = Path(f"/proc/{name}/environ").read_bytes()
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"TEST_NODE_MARK={mark}".encode() in environ and state not in "ZX":
            found.append(int(name))
    return found


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@dataclass
class Node:
    """One node. Everything that runs on it, services of ours too, carries its mark."""

    address: str
    mark: str
    process: subprocess.Popen[bytes]

    def left(self) -> list[int]:
        return marked(self.mark)

    def die(self) -> None:
        """As a host that loses its power: everything on it is gone at once."""
        deadline = time.monotonic() + 20
        while found := self.left():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            assert time.monotonic() < deadline, f"still there: {found}"
        self.process.wait()


@dataclass
class RayCluster:
    """`folder` is short: Ray keeps sockets in it."""

    folder: Path
    head: str = ""
    nodes: dict[str, Node] = field(default_factory=dict)

    def tmp(self, address: str) -> Path:
        """A node's own TMPDIR."""
        return self.folder / f"tmp-{address}"

    def start(self, address: str, cpus: int, gpus: int = 0, resources: str = "{}") -> Node:
        """One more node; the first one is the head. `gpus` are a number to Ray. `resources`: JSON, as it takes them."""
        words = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", address]
        words += ["--num-cpus", str(cpus), "--num-gpus", str(gpus), "--resources", resources]
        words += ["--object-store-memory", str(STORE), "--disable-usage-stats"]
        words += ["--min-worker-port", "0", "--max-worker-port", "0"]
        if self.head:
            words += ["--address", self.head]
        else:
            self.head = f"{address}:{free_port(address)}"
            words += ["--head", "--port", self.head.rpartition(":")[2], "--temp-dir", str(self.folder / "ray")]
            words += ["--include-dashboard=false", "--dashboard-port", str(free_port("127.0.0.1"))]
            words += ["--ray-client-server-port", str(free_port(address))]
        mark = uuid.uuid4().hex
        self.tmp(address).mkdir()
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("INFERMESH_", "RAY_"))}
        ours = {"TEST_NODE_MARK": mark, "TMPDIR": str(self.tmp(address)), "PYTHONPATH": str(Path(__file__).parents[2])}
        # No workers in reserve: on two cores they cost seconds. A dead node is known after 4 s instead of 15.
        ray = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
        ray |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
        with (self.folder / f"{address}.log").open("wb") as log:
            process = subprocess.Popen(
                words,
                env=keep | ours | ray,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = self.nodes[address] = Node(address, mark, process)
        deadline = time.monotonic() + START_S
        while b"Ray runtime started" not in (told := (self.folder / f"{address}.log").read_bytes()):
            assert process.poll() is None and time.monotonic() < deadline, told.decode()
            time.sleep(0.1)
        return node


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Nothing of it is left afterwards, processes and files alike."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    cluster = RayCluster(folder)
    try:
        yield cluster
    finally:
        for node in reversed(cluster.nodes.values()):
            node.die()
        shutil.rmtree(folder, ignore_errors=True)
