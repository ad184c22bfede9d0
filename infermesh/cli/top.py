"""`infermesh top`."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, Failure, connect

if TYPE_CHECKING:
    from infermesh.v1.mesh_pb2 import Group, Instance


def command(
    kind: Annotated[str, typer.Option(help="llm, embedding or rerank; default: all.")] = "",
    sort: Annotated[str, typer.Option(help="id, state, running or kv; the key s changes it.")] = "id",
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=60)] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once and end, as it does where there is no terminal.")
    ] = False,
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
) -> None:
    """Watch the fleet in a terminal: who is well, who is busy, how full the KV caches are. q or Ctrl-C ends it.

    Examples:
        infermesh top
        infermesh top --kind llm --sort kv
    """
    from rich.console import Console
    from rich.live import Live

    from infermesh.cli import top_view
    from infermesh.errors import MeshError, Reason

    if sort not in top_view.SORTS:
        raise Failure(f"--sort: {sort!r} is none of {', '.join(top_view.SORTS)}", BAD_USAGE)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200, height=100_000)  # a pipe cuts nothing off
    before: list[Instance] = []
    groups: list[Group] = []
    looked = 0.0
    note = ""
    with connect.client(gateway, api_key_file, 5.0) as mesh:

        def look() -> Any:
            nonlocal before, groups, looked, note
            shown = before
            try:
                shown, groups, note = mesh.instances(kind=kind), mesh.groups(kind=kind), ""
            except MeshError as error:
                if error.reason in (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED):
                    raise
                note = f"as it was {time.monotonic() - looked:.0f} s ago: {error.message}" if looked else error.message
                return top_view.screen(top_view.rows(before, [], 0.0), sort, note, *console.size, groups)
            now = time.monotonic()
            rows = top_view.rows(shown, before, now - looked)
            before, looked = shown, now
            return top_view.screen(rows, sort, note, *console.size, groups)

        if once or not console.is_terminal:
            found = look()
            if note:
                raise Failure(note)
            console.print(found)
            return
        with _keys() as pressed, Live(look(), console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(look(), refresh=True)
                key = pressed(interval)
                if key in ("q", "\x03", "\x1b"):
                    return
                if key == "s":
                    sort = top_view.SORTS[(top_view.SORTS.index(sort) + 1) % len(top_view.SORTS)]


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key and returns it, or nothing."""
    if not sys.stdin.isatty():

        def slept(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield slept
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 1).decode("latin-1") if ready else ""  # unbuffered, as select sees it

    try:
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
