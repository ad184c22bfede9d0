"""A CPU fleet as Compose runs it: two LLMs, embedding, rerank, gateway and Consul, rendered into a folder.

LLMs are vLLM with a tiny generated model, the encoders are MiniLM (the reranker is made of it), callers have keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from services.chassis.encoding.settings import find_source
from services.llm.tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
CHAT, EMBEDDING, RERANK = "tiny-noise", "all-minilm-l6-v2", "all-minilm-l6-v2-rerank"
LLMS = ("llm-1", "llm-2")
GRACE_S = 30  # what `render` gives unless told
UID = 10001


@dataclass(frozen=True, slots=True)
class Project:
    """`compose`: the folder that `render` wrote. `key`: an operator's. `grpc`, `http`: the gateway on this host."""

    compose: Path
    key: str
    grpc: str
    http: str


def written(folder: Path, llm_image: str) -> Project:
    """Models, keys and the rendered project below `folder`.

    Raises:
        subprocess.CalledProcessError: `infermesh render` refused the fleet.
    """
    write_tiny_model(folder / "models" / CHAT)
    shutil.copytree(find_source(""), folder / "models" / EMBEDDING)
    _let_read(folder)
    key, (grpc, http) = secrets.token_hex(32), _free_ports(2)
    project = Project(folder / "compose", key, f"127.0.0.1:{grpc}", f"127.0.0.1:{http}")
    fleet = folder / "fleet.yaml"
    fleet.write_text(yaml.safe_dump(fleet_file(folder / "models", project, llm_image), sort_keys=False))
    words = [sys.executable, "-P", "-m", "infermesh.cli", "render", "compose", str(fleet), "-o", str(project.compose)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environ, cwd=folder)
    _write_secrets(project)
    return project


def fleet_file(models: Path, project: Project, llm_image: str) -> Mapping[str, object]:
    llm = {"model": CHAT, "engine": "vllm", "image": llm_image, "max_running": 8}
    return {
        "version": 1,
        "models": [
            {"id": CHAT, "kind": "llm", "source": str(models / CHAT), "max_context": 2048},
            {"id": EMBEDDING, "kind": "embedding", "source": str(models / EMBEDDING)},
            {"id": RERANK, "kind": "rerank", "source": str(models / EMBEDDING), "scorer": "bi-encoder"},
        ],
        "instances": [
            *({"id": id, **llm, "environment": {"VLLM_CPU_KVCACHE_SPACE": 1}} for id in LLMS),
            {"id": "embedding-1", "model": EMBEDDING, "resources": {"cpus": 1, "memory_gib": 2}},
            {"id": "rerank-1", "model": RERANK, "backend": "torch", "resources": {"cpus": 1, "memory_gib": 2}},
        ],
        "gateway": {"grpc": project.grpc, "http": project.http, "keys": "secrets/keys.yaml"},
        "routing": {"objective": {"ttft_s": 2.0, "tpot_ms": 200}},
    }


def _write_secrets(project: Project) -> None:
    folder, digest = project.compose / "secrets", hashlib.sha256(project.key.encode()).hexdigest()
    folder.mkdir()
    keys = {"version": 1, "keys": [{"sha256": digest, "tenant": "ops", "role": "operator"}]}
    texts = {"keys.yaml": json.dumps(keys), "operator.key": project.key, "metrics.key": project.key}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o444)  # a file of whoever runs this, read by another user inside


def _let_read(folder: Path) -> None:
    """Temporary folders are their owner's alone; inside, another user reads them."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports
