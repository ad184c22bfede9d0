"""`infermesh chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, Failure, connect
from infermesh.cli.printing import emit_json, remark

if TYPE_CHECKING:
    from infermesh.client import Completion


def command(
    question: Annotated[
        list[str] | None, typer.Argument(help="What to ask; `-` or nothing reads standard input.")
    ] = None,
    model: connect.Model = "",
    system: Annotated[str, typer.Option(help="Instructions put before the question.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = greedy .. 2.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, (0, 1].")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer; can be given several times.")] = None,
    json_schema: Annotated[str, typer.Option(help="The answer is JSON of this schema.")] = "",
    session_id: Annotated[str, typer.Option(help="Requests of one session meet on one instance.")] = "",
    priority: Annotated[int, typer.Option(help="-100 .. 100; higher goes first.")] = 0,
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 600,
    json: connect.Json = False,
) -> None:
    """Ask a language model and stream its answer to the terminal.

    Which instance answered, and how many tokens it took, is told on standard error.

    Examples:
        infermesh chat 'Why is the sky blue?'
        infermesh chat -m qwen2.5-0.5b-instruct --max-tokens 50 'Name three colours.'
        git diff | infermesh chat --system 'Write a commit message.' -
        infermesh chat --json --temperature 0 'One word for happy?' | jq -r .choices[0].content
    """
    text = _question(question or [])
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "json_schema": json_schema,
        "session_id": session_id or None,
        "priority": priority or None,
    }
    options = {name: value for name, value in options.items() if value not in (None, "", [])}
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": text})
    with connect.client(gateway, api_key_file, timeout) as mesh:
        model = connect.only_model(mesh, "llm", model)
        if json:
            emit_json(document(mesh.chat(turns, model=model, **options)))
            return
        answer = None
        for chunk in mesh.chat_stream(turns, model=model, **options):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            answer = chunk.so_far
        print()
        if answer is not None:
            _tell(answer)


def _question(words: list[str]) -> str:
    text = sys.stdin.read() if words in ([], ["-"]) and not (words == [] and sys.stdin.isatty()) else " ".join(words)
    if not text.strip():
        raise Failure("nothing to ask: infermesh chat 'Why is the sky blue?'", BAD_USAGE)
    return text


def _tell(answer: Completion) -> None:
    usage, who = answer.usage, answer.served
    spent = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {usage.cached_tokens} cached"
    finish = answer.choices[0].finish if answer.choices else "no answer"
    remark(f"[{who.instance_id or '?'} · {answer.model} · {spent} · {finish}]")


def document(answer: Completion) -> dict[str, Any]:
    """The whole answer for `--json`."""
    return {
        "id": answer.id,
        "model": answer.model,
        "created": answer.created,
        "instance_id": answer.served.instance_id,
        "attempts": answer.served.attempts,
        "request_id": answer.served.request_id,
        "choices": [
            {
                "index": choice.index,
                "content": choice.content,
                "reasoning": choice.reasoning,
                "tool_calls": [{"id": c.id, "name": c.name, "arguments": c.arguments} for c in choice.tool_calls],
                "finish": choice.finish,
            }
            for choice in answer.choices
        ],
        "usage": {
            "prompt_tokens": answer.usage.prompt_tokens,
            "completion_tokens": answer.usage.completion_tokens,
            "cached_tokens": answer.usage.cached_tokens,
        },
    }
