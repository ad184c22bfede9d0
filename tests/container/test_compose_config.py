"""Compose itself reads what `render` writes. No engine is needed for that; whether it runs, `make compose` shows."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.render.compose import compose
from deploy.render.shipped import shipped_files
from tests.kit.debian import NoProgram, not_here, unpacked
from tests.kit.rendering import SITE, example


@pytest.fixture(scope="module")
def program() -> Path:
    """Compose by itself, without the docker client."""
    try:
        root = unpacked("compose", ["docker-compose"], suite="trixie")
    except NoProgram as why:
        not_here(why)
    return root / "usr" / "libexec" / "docker" / "cli-plugins" / "docker-compose"


@pytest.mark.parametrize("name", ["containers.yaml", "laptop.yaml", "scripted.yaml", "tls.yaml"])
def test_compose_takes_the_project_and_an_images_other_name(name: str, tmp_path: Path, program: Path) -> None:
    made = compose(example(name), SITE, shipped_files())
    for path, text in made.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    environ = {**os.environ, "CONSUL_IMAGE": "mirror.example/consul:1"}
    words = [str(program), "--profile", "obs", "config", "--format", "json"]
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["services"]
    assert set(told) == set(yaml.safe_load(made.files["compose.yaml"])["services"])
    assert told["consul"]["image"] == "mirror.example/consul:1"
    assert told["prometheus"]["image"].startswith("prom/prometheus:")
