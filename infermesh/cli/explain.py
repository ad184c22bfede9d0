"""`infermesh explain`."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from infermesh.cli import connect
from infermesh.cli.printing import emit_json, table

# The words of docs/architecture.md, said out.
REASONS = {
    "least_cost": "the least cost",
    "only_candidate": "nobody else could",
    "tie": "as cheap as others; chance decided",
    "backlog": "the least cost, but work is queued there",
    "no_room": "nobody has room",
    "settling": "the gateway is young and waits for the directory to fill",
}
REJECTIONS = {
    "excluded": "an attempt there failed already",
    "draining": "is leaving",
    "banned": "an operator took it out",
    "lost": "cannot be reached",
    "starting": "is not ready yet",
    "suspect": "is in doubt, and others are healthy",
    "ejected": "answers, but does not do its work",
    "unlike": "could not go on with what another one began",
    "context_over": "prompt and answer are longer than it takes",
    "context_under": "prompt and answer are shorter than it is meant for",
    "no_room": "its KV cache is too small for prompt and answer",
}
SHOWN = 20  # candidates


def command(
    request_id: Annotated[str, typer.Option(help="A past request's x-request-id: what was decided for it.")] = "",
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
    """Show where a request that is only described would go now, and why; or what was decided for a past one, every
    attempt of it. Each gateway remembers its own requests: ask the one that served it.

    Examples:
        infermesh explain --model qwen2.5-0.5b-instruct --prompt-tokens 2000
        infermesh explain --json --kind embedding --prompt-tokens 50
        infermesh explain --request-id req-0b3c5a
    """
    from infermesh.v1.mesh_pb2 import ExplainRequest

    if request_id:
        record = _past(request_id, gateway.split(","), api_key_file, timeout)
    else:
        with connect.client(gateway, api_key_file, timeout) as mesh:
            request = ExplainRequest(
                kind=kind,
                model=connect.only_model(mesh, kind, model),
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                features=feature or [],
            )
            record = jsonlib.loads(mesh.explain(request))
    if json:
        emit_json(record)
    elif request_id:
        _print_past(record)
    else:
        _print(record)


def _past(request_id: str, gateways: Sequence[str], api_key_file: Path | None, timeout: float) -> Any:
    """What one of the gateways remembers; each of them is asked, since they share nothing."""
    from infermesh.errors import MeshError, Reason
    from infermesh.v1.mesh_pb2 import ExplainRequest

    failed: MeshError | None = None
    for address in gateways:
        with connect.client(address, api_key_file, timeout) as mesh:
            try:
                return jsonlib.loads(mesh.explain(ExplainRequest(request_id=request_id)))
            except MeshError as error:
                if failed is None or failed.reason is Reason.NOT_FOUND:  # one that could not answer is worth telling
                    failed = error
    assert failed is not None
    raise failed


def _print_past(found: Mapping[str, Any]) -> None:
    request, decisions = found["request"], found["decisions"]
    ended = datetime.fromtimestamp(request["at"]).astimezone()
    print(f"{request['request_id']}: {request['method']}, model {request['model']}, tenant {request['tenant']}")
    print(f"ended {ended:%Y-%m-%d %H:%M:%S %Z} after {_seconds(request['duration_s'])}: {request['outcome']}")
    if request["ttft_s"]:
        due = decisions[-1]["predicted_ttft_s"] if decisions else 0.0
        told = f"{request['prompt_tokens']} tokens, {request['cached_tokens']} cached"
        aside = f", put aside {request['preempted']} times for shorter prompts" if request.get("preempted") else ""
        print(f"first token after {_seconds(request['ttft_s'])}{aside}, predicted was {_seconds(due)}")
        print(f"prompt {told}; answer {request['completion_tokens']} tokens")
    for number, decision in enumerate(decisions, 1):
        print(f"\ndecision {number} of {len(decisions)}, which ended as {decision['outcome']}")
        _print(decision)


def _print(record: Mapping[str, Any]) -> None:
    """A record for people; `--json` has the same in full."""
    chosen, word = record["chosen"], record["reason"]
    degraded = f", degraded from {record['degraded_from']}" if record["degraded_from"] else ""
    print(f"{record['model']} ({record['kind']}{degraded}): {chosen or 'nobody'}, {REASONS.get(word, word)}")
    if chosen:
        times = [_seconds(record[name]) for name in ("predicted_ttft_s", "estimate_s", "waited_s")]
        print("first token due in {}, cost {}, waited {}".format(*times))
        told = f"{record['prompt_tokens']} tokens, {record['cached_tokens']} thought to be cached"
        print(f"prompt {told}; answer {record['output_tokens']} tokens expected")
    candidates = sorted(record["candidates"], key=lambda one: (one["id"] != chosen, one["cost_s"], one["id"]))
    if candidates:
        terms = list(candidates[0]["terms"])
        columns = ("", "INSTANCE", "COST", *(term.upper() for term in terms), "CACHED", "WEIGHT", "READY")
        table(columns, [_row(one, chosen, terms) for one in candidates[:SHOWN]])
    more = len(candidates[SHOWN:]) + record["unexamined"]
    if more:
        print(f"and {more} more, none of them sooner")
    for one in record["rejected"]:
        reason = one["reason"]
        said = f"lacks {reason.removeprefix('feature:')}" if reason.startswith("feature:") else REJECTIONS.get(reason)
        print(f"rejected {one['id']}: {reason}" + (f" ({said})" if said else ""))


def _row(one: Mapping[str, Any], chosen: str, terms: Sequence[str]) -> tuple[str, ...]:
    return (
        "->" if one["id"] == chosen else "",
        one["id"],
        _seconds(one["cost_s"]),
        *(_seconds(one["terms"][term]) for term in terms),
        str(one["cached_tokens"]),
        f"{one['weight']:g}",
        "yes" if one["ready"] else "no",
    )


def _seconds(value: float) -> str:
    return "0" if not value else f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"
