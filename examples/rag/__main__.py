"""The assistant on the command line; see `--help`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from examples.rag.assistant import Assistant
from examples.rag.evaluate import evaluate, questions
from examples.rag.index import index
from examples.rag.store import Store, StoreError
from infermesh.client import Answer, Client, MeshError

app = typer.Typer(no_args_is_help=True, help=sys.modules["examples.rag"].__doc__, rich_markup_mode=None)
say = Console(stderr=True, highlight=False)
OWN = [Path("README.md"), Path("docs")]

Where = Annotated[Path, typer.Option("--store", help="Folder of the vector store.")]
Gateway = Annotated[str, typer.Option(envvar="INFERMESH_GATEWAY", help="Gateway's gRPC address.")]
Key = Annotated[str, typer.Option(envvar="INFERMESH_API_KEY", help="API key, where the gateway wants one.")]
Embedding = Annotated[str, typer.Option(help="Embedding model.")]
Chat = Annotated[str, typer.Option(help="Language model; needed where several are served.")]
Document = Annotated[str, typer.Option(help="Talk about this document: all of it is shown, and stays cached.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
STORE = Path(".infermesh/rag")
GATEWAY = "127.0.0.1:50050"
MINILM = "all-minilm-l6-v2"


@app.command("index")
def index_command(
    paths: Annotated[list[Path] | None, typer.Argument(help="Files and folders. Default: README.md and docs.")] = None,
    store: Where = STORE,
    gateway: Gateway = GATEWAY,
    api_key: Key = "",
    embedding_model: Embedding = MINILM,
) -> None:
    """Embed what is new or changed in the documents; what is gone leaves the store."""
    given = paths or OWN
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        raise typer.BadParameter(f"not found: {', '.join(missing)}")
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Client(gateway, api_key=api_key) as mesh, Store(store) as kept, Progress(*columns, console=say) as bar:
        task = bar.add_task("", total=None)
        found = index(given, kept, mesh, embedding_model, lambda done, all: bar.update(task, completed=done, total=all))
    for line in found.skipped:
        say.print(f"left out {line}", style="yellow")
    say.print(f"{found.documents} documents, {found.passages} passages, {found.embedded} of them embedded now")


@app.command()
def ask(
    question: str,
    store: Where = STORE,
    gateway: Gateway = GATEWAY,
    api_key: Key = "",
    chat_model: Chat = "",
    document: Document = "",
    max_tokens: MaxTokens = 256,
) -> None:
    """Answer one question, and say from where."""
    with Client(gateway, api_key=api_key) as mesh, Store(store) as kept:
        _answer(Assistant(kept, mesh, document=document, chat_model=chat_model, max_tokens=max_tokens), question)


@app.command()
def chat(
    store: Where = STORE,
    gateway: Gateway = GATEWAY,
    api_key: Key = "",
    chat_model: Chat = "",
    document: Document = "",
    max_tokens: MaxTokens = 256,
) -> None:
    """Ask one question after the other; an empty line ends it."""
    with Client(gateway, api_key=api_key) as mesh, Store(store) as kept:
        assistant = Assistant(kept, mesh, document=document, chat_model=chat_model, max_tokens=max_tokens)
        while question := _next():
            _answer(assistant, question)


@app.command("evaluate")
def evaluate_command(
    store: Where = STORE,
    gateway: Gateway = GATEWAY,
    api_key: Key = "",
    chat_model: Chat = "",
    k: Annotated[int, typer.Option(min=1, max=100, help="Passages that count.")] = 3,
) -> None:
    """Ask twenty questions about this repository, and count how often the right passage is among the first k."""
    table = Table("question", "expected", f"in the first {k}")
    hits = 0
    with Client(gateway, api_key=api_key) as mesh, Store(store) as kept:
        asked = questions()
        for verdict in evaluate(asked, kept, mesh, k, chat_model=chat_model):
            hits += verdict.hit
            one = verdict.expected
            table.add_row(one.question, one.document, "yes" if verdict.hit else f"no: {', '.join(verdict.found)}")
    Console(highlight=False).print(table)
    print(f"recall@{k}: {hits}/{len(asked)} = {hits / len(asked):.2f}")


def _next() -> str:
    try:
        return input("\n? ").strip()
    except EOFError:
        return ""


def _answer(assistant: Assistant, question: str) -> None:
    answer = Answer()
    for chunk in assistant.ask(question):
        print(chunk.text, end="", flush=True)
        answer = chunk.so_far  # type: ignore[assignment]
    print()
    for number, passage in enumerate(assistant.shown, 1):
        pinned = " (as before)" if answer.cited[number - 1].pinned else ""
        heading = passage.text.partition("\n")[0].partition(" › ")[2]
        source = f"{os.path.relpath(passage.document)} › {heading}" if heading else os.path.relpath(passage.document)
        say.print(f"  [{number}] {source}{pinned}", style="cyan", markup=False, soft_wrap=True)
    for stage in answer.stages:
        if stage.skipped:
            say.print(f"  {stage.name} skipped: {stage.skipped}", style="yellow", markup=False, soft_wrap=True)
    usage = answer.usage
    share = usage.cached_tokens / usage.prompt_tokens if usage.prompt_tokens else 0.0
    say.print(
        f"  {answer.model} on {answer.served.instance_id}: {usage.prompt_tokens} prompt tokens, {share:.0%} cached",
        style="dim",
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        app()
    except (MeshError, StoreError) as error:
        say.print(str(error), style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
