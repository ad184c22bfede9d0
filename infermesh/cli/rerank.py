"""`infermesh rerank`: with a query it asks the mesh; without one it is a rerank service (serve_rerank.py)."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, Failure, connect
from infermesh.cli.printing import emit_json, remark


def command(
    query: Annotated[str, typer.Argument(help="What the documents should be about.")],
    documents: Annotated[list[str] | None, typer.Argument(help="Documents; `-` or nothing reads one a line.")] = None,
    model: connect.Model = "",
    top_n: Annotated[int, typer.Option(help="Only the best so many; 0 = all.", min=0)] = 0,
    raw_scores: Annotated[bool, typer.Option("--raw-scores", help="The scorer's own numbers.")] = False,
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 600,
    json: connect.Json = False,
) -> None:
    """Order documents by relevance to a query, the best first.

    Without a query this verb runs a rerank service; its options are below.

    Examples:
        infermesh rerank 'capital of France' 'Paris is in France.' 'Cats purr.'
        cat passages.txt | infermesh rerank --top-n 5 'capital of France' -
        infermesh rerank --model my-reranker --source BAAI/bge-reranker-base --listen 127.0.0.1:0
    """
    import sys

    texts = documents or []
    if texts in ([], ["-"]) and not (texts == [] and sys.stdin.isatty()):
        texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        raise Failure("no documents: infermesh rerank QUERY DOCUMENT…", BAD_USAGE)
    with connect.client(gateway, api_key_file, timeout) as mesh:
        model = connect.only_model(mesh, "rerank", model)
        result = mesh.rerank(query, texts, model=model, top_n=top_n, raw_scores=raw_scores)
    if json:
        hits = [{"index": hit.index, "score": hit.score, "document": texts[hit.index]} for hit in result]
        emit_json({"model": result.model, "instance_id": result.served.instance_id, "results": hits})
        return
    for hit in result:
        print(f"{hit.score:.4f}\t{hit.index}\t{texts[hit.index]}")
    remark(f"[{result.served.instance_id or '?'} · {result.model} · {len(result)} of {len(texts)}]")


def build() -> Any:
    """One verb in two parts: what the arguments look like decides which of them parses and runs."""
    from infermesh.cli.serve_rerank import command as serve_command
    from infermesh.cli.verbs import command_of

    ask, serve = command_of(command, "rerank"), command_of(serve_command, "rerank")
    parse, show = ask.make_context, ask.format_options

    def make_context(info_name: str, args: list[str], parent: Any = None, **extra: Any) -> Any:
        chosen = parse if asks(args, ask, serve) else serve.make_context
        return chosen(info_name, args, parent=parent, **extra)

    def format_options(ctx: Any, formatter: Any) -> None:
        show(ctx, formatter)
        with formatter.section("Options of the service"):
            known = {name for option in ask.params for name in option.opts}
            records = [option.get_help_record(ctx) for option in serve.params if not known & set(option.opts)]
            formatter.write_dl([record for record in records if record])

    ask.make_context, ask.format_options = make_context, format_options
    return ask


def asks(args: list[str], ask: Any, serve: Any) -> bool:
    """Is this a question to the mesh? Yes with a positional argument or a plea for help. An option that only the
    service has, or no positional at all, makes it the service.
    """
    own = {name: option for option in ask.params for name in option.opts if name.startswith("-")}
    others = {name for option in serve.params for name in option.opts if name.startswith("-")} - set(own)
    skip, positional = False, False
    for word in args:
        name = word.split("=")[0]
        if skip:
            skip = False
        elif name in ("--help", "-h"):
            return True
        elif name in others:
            return False
        elif name in own:
            skip = "=" not in word and not getattr(own[name], "is_flag", False)
        elif not word.startswith("-") or word == "-":
            positional = True
    return positional
