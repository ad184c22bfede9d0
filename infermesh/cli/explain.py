"""`infermesh explain`."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any

import typer

from infermesh.cli import connect
from infermesh.cli.printing import emit_json


def command(
    request_id: Annotated[
        str, typer.Argument(help="A past request's x-request-id; not kept by this version, which says so.")
    ] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="Model id.")] = "",
    kind: Annotated[str, typer.Option(help="llm, embedding or rerank.")] = "llm",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt, tokens.", min=0)] = 100,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=0)] = 100,
    feature: Annotated[list[str] | None, typer.Option(help="What it needs: tools, json_schema, logprobs …")] = None,
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 10,
    json: connect.Json = False,
) -> None:
    """Show the decision record of a request that is only described: where it would go now, and why.

    Examples:
        infermesh explain --model qwen2.5-0.5b-instruct --prompt-tokens 2000
        infermesh explain --json --kind embedding --prompt-tokens 50
    """
    from infermesh.v1.mesh_pb2 import ExplainRequest

    with connect.client(gateway, api_key_file, timeout) as mesh:
        if not request_id:
            model = connect.only_model(mesh, kind, model)
        request = ExplainRequest(
            request_id=request_id,
            kind=kind,
            model=model,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            features=feature or [],
        )
        record = jsonlib.loads(mesh.explain(request))
    if json:
        emit_json(record)
    else:
        _print(record, "")


def _print(value: Any, indent: str) -> None:
    """A record as indented lines; it is read by people, its keys are the record's own."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list) and item:
            print(f"{indent}{key}:")
            _print(item, indent + "  ")
        else:
            print(f"{indent}{key}: {item}")
