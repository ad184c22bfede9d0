"""The images that the fleet runs on: ours by `make images`; without Docker Hub, Consul and Prometheus are programs
of Debian on the same base.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from deploy.render.compose import CONSUL
from deploy.render.observability import IMAGES
from infermesh import __version__
from tests.container.fleet import ROOT
from tests.kit.consul import consul_binary
from tests.kit.prometheus import prometheus_binary

BASE = "infermesh-base:bookworm"
DOCKERFILES = {
    "consul": f"""\
FROM {BASE}
COPY consul /usr/local/bin/consul
RUN install -d -o 100 -g 1000 /consul/data
ENTRYPOINT ["consul"]
""",
    "prometheus": f"""\
FROM {BASE}
COPY prometheus /usr/local/bin/prometheus
RUN install -d -o 65534 -g 65534 /prometheus
USER 65534
ENTRYPOINT ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
""",
}


@dataclass(frozen=True, slots=True)
class Images:
    """`environ`: what the project is started with. `built`: lines of `make images`: name, size, time."""

    llm: str
    environ: dict[str, str] = field(default_factory=dict)
    built: tuple[str, ...] = ()


def images(names: list[str]) -> Images:
    """Builds what is named of gateway, encoder and llm, and provides for the rest.

    Raises:
        subprocess.CalledProcessError: one cannot be built; what docker said is on stderr.
    """
    hub = all(
        subprocess.run(["docker", "pull", "-q", name], capture_output=True).returncode == 0 for name in _foreign()
    )
    words = f"{' '.join(names)} --accelerator cpu --base {'hub' if hub else 'debian'}"
    told = subprocess.run(
        ["make", "-s", "images", f"ARGS={words}"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return Images(
        llm=f"infermesh-llm:{__version__}-cpu",
        environ={} if hub else {"CONSUL_IMAGE": _debian("consul"), "PROMETHEUS_IMAGE": _debian("prometheus")},
        built=tuple(line for line in told.stdout.splitlines() if line.startswith("infermesh-")),
    )


def _foreign() -> list[str]:
    return [name.split(":-")[1].rstrip("}") for name in (CONSUL, IMAGES["prometheus"])]


def _debian(name: str) -> str:
    program = consul_binary() if name == "consul" else prometheus_binary()
    tag = f"infermesh-test-{name}"
    with tempfile.TemporaryDirectory(prefix="infermesh-image-") as temporary:
        shutil.copy(program, temporary)
        (Path(temporary) / "Dockerfile").write_text(DOCKERFILES[name])
        # `host`: an engine of our own has no default bridge.
        words = ["docker", "build", "-q", "--network", "host", "-t", tag, temporary]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return tag
