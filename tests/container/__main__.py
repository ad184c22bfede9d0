"""The rendered Compose project for real: images built, up, load, an LLM killed, another stopped, watched, down.

    make compose      about ten minutes on two cores and 12 GiB of disk (ARGS="--write" puts it into docs/deploy.md)

Exit code 1 when something is not as it must be, 2 where there is no Docker Engine and none can be started.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import docker
from testcontainers.compose import DockerCompose

from tests.bench.pages import put_section
from tests.container.checks import Lines, confined, killed_and_stopped, leftovers
from tests.container.fleet import ROOT, written
from tests.container.images import images
from tests.container.watching import watched
from tests.kit.children import leave_nothing_when_told_to_stop
from tests.kit.docker_engine import NoDocker, docker_engine

PAGE = ROOT / "docs" / "deploy.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.container", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the images of an engine of our own for the next run")
    parser.add_argument("--write", action="store_true", help="put what was measured into docs/deploy.md")
    given = parser.parse_args()
    lines = Lines()
    try:
        with (
            docker_engine(keep=given.keep) as environ,
            tempfile.TemporaryDirectory(prefix="infermesh-compose-") as folder,
        ):
            os.environ.update(environ)
            proven(Path(folder), lines)
    except NoDocker as why:
        print(f"compose: {why}", file=sys.stderr)
        return 2
    if given.write and not lines.failed:
        put_section(PAGE, "compose", lines.table(f"{platform.system()} {os.cpu_count()} cores"))
    print(f"\n{len(lines.all)} checks, {len(lines.failed)} failed")
    return 1 if lines.failed else 0


def proven(folder: Path, lines: Lines) -> None:
    made = images(["gateway", "encoder", "llm"])
    for line in made.built:
        name, _, measured = line.partition(": ")
        lines.add(f"`{name}` built", True, measured)
    os.environ.update(made.environ)
    project = written(folder, made.llm)
    everything = DockerCompose(project.compose, profiles=["obs"])
    try:
        begun = time.monotonic()
        DockerCompose(project.compose).start()
        lines.add("`docker compose up --wait`: every health check passes", True, f"{time.monotonic() - begun:.0f} s")
        client = docker.from_env()
        confined(client, lines)
        DockerCompose(project.compose, profiles=["obs"], services=["prometheus"]).start()
        asyncio.run(killed_and_stopped(client, project, lines))
        watched(lines)
    except BaseException:
        print("\n".join(everything.get_logs())[-20000:], file=sys.stderr)
        raise
    finally:
        everything.stop()
    leftovers(client, lines)


if __name__ == "__main__":
    leave_nothing_when_told_to_stop()
    sys.exit(main())
