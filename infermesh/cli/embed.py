"""`infermesh embed`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, Failure, connect
from infermesh.cli.printing import emit_json, remark


def command(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; `-` or nothing reads one a line.")] = None,
    model: connect.Model = "",
    dimensions: Annotated[int, typer.Option(help="Keep the first so many; 0 = all.", min=0)] = 0,
    normalize: Annotated[bool | None, typer.Option(help="Unit length; default: as the model does.")] = None,
    truncation: Annotated[str, typer.Option(help="Too long: none (refuse), end or start.")] = "",
    task: Annotated[str, typer.Option(help="One of the model's prompts, e.g. query or document.")] = "",
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 600,
    json: connect.Json = False,
) -> None:
    """Turn texts into vectors: one line of numbers a text, or with --json one document.

    Examples:
        infermesh embed 'The cat sat on the mat.'
        infermesh embed --json --dimensions 8 'first' 'second'
        cat lines.txt | infermesh embed -m all-minilm-l6-v2 - > vectors.txt
    """
    inputs = texts or []
    if inputs in ([], ["-"]) and not (inputs == [] and sys.stdin.isatty()):
        inputs = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not inputs:
        raise Failure("nothing to embed: infermesh embed 'some text'", BAD_USAGE)
    options: dict[str, Any] = {"dimensions": dimensions, "normalize": normalize, "truncation": truncation, "task": task}
    with connect.client(gateway, api_key_file, timeout) as mesh:
        try:
            result = mesh.embed(inputs, model=connect.only_model(mesh, "embedding", model), **options)
        except ValueError as error:
            raise Failure(f"--truncation: {error}", BAD_USAGE) from None
    if json:
        emit_json(
            {
                "model": result.model,
                "instance_id": result.served.instance_id,
                "dimensions": result.dimensions,
                "embeddings": result.tolist(),
                "usage": {"prompt_tokens": result.usage.prompt_tokens},
            }
        )
        return
    for vector in result:
        print(" ".join(f"{value:.6g}" for value in vector))
    remark(f"[{result.served.instance_id or '?'} · {result.model} · {len(result)} × {result.dimensions}]")
