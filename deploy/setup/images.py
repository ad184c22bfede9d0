"""Build the container images with what pip is set to on this machine: its index, certificate and folders of wheels.

python deploy/setup/images.py [gateway] [encoder] [llm] [--accelerator cpu] [--base debian]

`--base debian`, where Docker Hub cannot be reached: the Dockerfiles' base is made here, of Debian bookworm and its
Python 3.11, by debootstrap (root) from the archive that apt is set to. Standard library only, like all of this folder.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pip_settings import Settings, read_settings

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("gateway", "encoder", "llm")
BASE = "infermesh-base:bookworm"
SUITE, PACKAGES = "bookworm", "python3,python3-venv,ca-certificates"
CA = "/etc/ssl/certs/ca-certificates.crt"  # inside; the Dockerfiles put the secret ca.crt there


def version() -> str:
    """Return the version of the checkout, which the images are tagged with, as `render` expects."""
    found = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert found
    return found[1]


def base_image() -> None:
    """Make BASE when it is not there."""
    if subprocess.run(["docker", "image", "inspect", BASE], capture_output=True, check=False).returncode == 0:
        return
    if not shutil.which("debootstrap") or os.getuid() != 0:
        sys.exit("--base debian needs debootstrap and root: apt-get install debootstrap")
    with tempfile.TemporaryDirectory(prefix="infermesh-base-", dir="/var/tmp") as temporary:
        root = Path(temporary) / "root"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root, archive()], check=True
        )
        for folder in ("var/lib/apt/lists", "var/cache/apt", "var/log"):
            shutil.rmtree(root / folder, ignore_errors=True)
            (root / folder).mkdir()
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as packed:
            subprocess.run(["docker", "import", "-", BASE], stdin=packed.stdout, check=True)


def archive() -> str:
    """Return the Debian archive that apt is set to."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line for line in told if "security" not in line]
    return found[0] if found else sys.exit("apt has no package lists here: apt-get update")


@contextlib.contextmanager
def reachable(settings: Settings) -> Iterator[Settings]:
    """Serve folders of this machine that pip looks into, on loopback, for as long as images are built."""
    with contextlib.ExitStack() as stack:

        def served(place: str, *, parent: bool) -> str:
            folder = Path(place.removeprefix("file://")).absolute()
            if "://" in place.removeprefix("file://") or not folder.is_dir():
                return place
            shown = folder.parent if parent else folder  # an index refers to files beside it
            handler = functools.partial(Quiet, directory=str(shown))
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}/" + (folder.name if parent else "")

        yield replace(
            settings,
            extra_index_urls=tuple(served(one, parent=True) for one in settings.extra_index_urls),
            find_links=tuple(served(one, parent=False) for one in settings.find_links),
        )


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Without a line a request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def pip_conf(settings: Settings) -> str:
    """Return pip's configuration inside."""
    told = {
        "index-url": settings.index_url,
        "extra-index-url": " ".join(settings.extra_index_urls),
        "find-links": " ".join(settings.find_links),
        "no-index": "true" if settings.no_index else "",
        "trusted-host": " ".join(settings.trusted_hosts),
        "timeout": settings.timeout,
        "cert": CA if settings.cert else "",
    }
    return "\n".join(["[global]", *(f"{key} = {value}" for key, value in told.items() if value), ""])


def uv_toml(settings: Settings) -> str:
    """Return the same for uv."""
    lines = [f"find-links = {list(settings.find_links)!r}", f"allow-insecure-host = {list(settings.trusted_hosts)!r}"]
    lines += [f"no-index = {str(settings.no_index).lower()}", f"system-certs = {str(bool(settings.cert)).lower()}"]
    if settings.extra_index_urls:
        lines.append('index-strategy = "unsafe-best-match"')  # as pip does
    lines += [f"[[index]]\nurl = {url!r}" for url in settings.extra_index_urls]
    if settings.index_url:
        lines.append(f"[[index]]\nurl = {settings.index_url!r}\ndefault = true")
    return "\n".join([*lines, ""])


def build(name: str, tag: str, settings: Settings, arguments: Sequence[str]) -> None:
    """Build one image from the checkout."""
    with tempfile.TemporaryDirectory(prefix="infermesh-images-") as temporary:
        secrets = {"pip.conf": Path(temporary) / "pip.conf", "uv.toml": Path(temporary) / "uv.toml"}
        secrets["pip.conf"].write_text(pip_conf(settings))
        secrets["uv.toml"].write_text(uv_toml(settings))
        if settings.cert:
            secrets["ca.crt"] = Path(settings.cert)
        command = ["docker", "build", "--network", "host", "-f", f"deploy/images/{name}.Dockerfile", "-t", tag]
        for id, path in secrets.items():
            command += ["--secret", f"id={id},src={path}"]
        for argument in (*arguments, *(f"{key}={settings.proxy}" for key in PROXIES if settings.proxy)):
            command += ["--build-arg", argument]
        started = time.monotonic()
        if subprocess.run([*command, "."], cwd=ROOT, check=False).returncode:
            sys.exit(f"{tag}: not built, see above")
    told = ["docker", "image", "inspect", "--format", "{{.Size}}", tag]
    size = int(subprocess.run(told, capture_output=True, text=True, check=True).stdout)
    print(f"{tag}: {size / 2**20:.0f} MiB, {time.monotonic() - started:.0f} s", flush=True)


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY")


def main() -> None:
    """Build what is named, all unless told."""
    parser = argparse.ArgumentParser(prog="images.py", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*IMAGES, []])
    parser.add_argument("--accelerator", choices=["gpu", "cpu"], default="gpu", help="what vLLM in llm is for")
    parser.add_argument("--base", choices=["hub", "debian"], default="hub")
    given = parser.parse_args()
    arguments = []
    if given.base == "debian":
        base_image()
        arguments.append(f"BASE={BASE}")
    settings = read_settings(Path(sys.executable))
    if given.accelerator == "gpu":
        settings = settings.for_gpu()
    cpu = given.accelerator == "cpu"
    if cpu and not settings.has_local_wheel("torch"):
        arguments.append("TORCH_BACKEND=cpu")
    with reachable(settings) as told:
        for name in given.names or IMAGES:
            tag = version() + ("-cpu" if cpu and name == "llm" else "")
            more = [f"ACCELERATOR={given.accelerator}"] if name == "llm" else []
            build(name, f"infermesh-{name}:{tag}", told, [*arguments, *more])


if __name__ == "__main__":
    main()
