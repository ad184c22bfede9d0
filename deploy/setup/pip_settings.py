"""What pip is configured with on this machine, in uv's terms. uv reads neither pip's files nor its variables."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

TRUE = {"1", "true", "yes", "on"}


@dataclass(frozen=True)
class Settings:
    """The options of pip that matter for finding and fetching packages."""

    index_url: str = ""
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    no_index: bool = False
    cert: str = ""
    client_cert: str = ""
    proxy: str = ""
    timeout: str = ""
    trusted_hosts: tuple[str, ...] = field(default=())

    def environ(self) -> dict[str, str]:
        """Return the environment for uv. What the user has set for uv itself stays."""
        found = {
            "UV_DEFAULT_INDEX": self.index_url,
            "UV_INDEX": " ".join(self.extra_index_urls),
            # pip takes the best version from all indexes; uv would stop at the first that knows the name.
            "UV_INDEX_STRATEGY": "unsafe-best-match" if self.extra_index_urls else "",
            "UV_FIND_LINKS": ",".join(self.find_links),
            "UV_NO_INDEX": "1" if self.no_index else "",
            "SSL_CERT_FILE": self.cert,
            "SSL_CLIENT_CERT": self.client_cert,
            "HTTP_PROXY": self.proxy,
            "HTTPS_PROXY": self.proxy,
            "UV_HTTP_TIMEOUT": self.timeout,
            "UV_INSECURE_HOST": " ".join(self.trusted_hosts),
            "UV_CACHE_DIR": spare_cache(),
        }
        kept = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
        return {key: value for key, value in found.items() if value} | kept

    def has_local_wheel(self, package: str) -> bool:
        """Say whether a folder among find-links holds a wheel of the package for this Python."""
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        return any(wheels(link, f"{package}-*-{tag}-*") for link in self.find_links)

    def for_gpu(self) -> Settings:
        """Leave out folders with a CPU build of torch: its version counts as higher than the CUDA build's."""
        return replace(self, find_links=tuple(link for link in self.find_links if not wheels(link, "torch-*+cpu-*")))


def wheels(link: str, pattern: str) -> list[Path]:
    """Return the wheels in a find-links folder; none when it is an address elsewhere."""
    folder = Path(link.removeprefix("file://"))
    return list(folder.glob(f"{pattern}.whl")) if folder.is_dir() else []


def spare_cache() -> str:
    """Return a cache folder in the checkout when the home folder cannot be written, else nothing."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    while not place.exists() and place != place.parent:
        place = place.parent
    return "" if os.access(place, os.W_OK) else str(Path(__file__).resolve().parents[2] / ".venv-uv" / "cache")


def parse(listing: str) -> Settings:
    """Read the output of `pip config list`: section.key='value'; later sections overrule earlier ones."""
    rank = {"global": 0, "install": 1, ":env:": 2}
    values: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        name, _, text = line.partition("=")
        section, _, key = name.strip().rpartition(".")
        if section not in rank or not text:
            continue
        key = key.replace("_", "-")
        try:
            value = str(ast.literal_eval(text))
        except (ValueError, SyntaxError):
            continue
        if key not in values or values[key][0] <= rank[section]:
            values[key] = (rank[section], value)

    def one(key: str) -> str:
        return values.get(key, (0, ""))[1].strip()

    return Settings(
        index_url=one("index-url"),
        extra_index_urls=tuple(one("extra-index-url").split()),
        find_links=tuple(one("find-links").split()),
        no_index=one("no-index").lower() in TRUE,
        cert=one("cert"),
        client_cert=one("client-cert"),
        proxy=one("proxy"),
        timeout=one("timeout") or one("default-timeout"),
        trusted_hosts=tuple(one("trusted-host").split()),
    )


def read_settings(python: Path) -> Settings:
    """Ask the pip of that Python."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return parse(done.stdout)
