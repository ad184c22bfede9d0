"""The `infermesh` command. Verbs live in a file each and are imported when they are called (verbs.py).

Exit codes: 0 done, 1 failed, 2 bad usage or configuration. Standard output carries results only; all else goes to
standard error. `INFERMESH_DEBUG=1` adds the traceback to an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

DONE, FAILED, BAD_USAGE = 0, 1, 2
INTERRUPTED = 130  # typer's own code for Ctrl-C


class Failure(Exception):
    """Ends the command with one line for the operator: what is wrong and what to do about it."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the process's exit code."""
    from infermesh.cli.verbs import UsageError, root

    try:
        words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
        code = root().main(args=words, prog_name="infermesh", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:
            return _tell("infermesh: stopped", FAILED)
        return code if isinstance(code, int) else DONE
    except UsageError as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "infermesh"
        return _tell(f"{where}: {error.format_message()}\ntry: {where} --help", BAD_USAGE)  # type: ignore[attr-defined]
    except BrokenPipeError:
        # Whoever read our output has left (`infermesh instances | head`); nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (KeyboardInterrupt, EOFError):
        return _tell("infermesh: stopped", FAILED)
    except Exception as error:
        if os.environ.get("INFERMESH_DEBUG"):
            raise
        return _tell(*_explain(error))


def _explain(error: Any) -> tuple[str, int]:
    """What a person should read, and the exit code."""
    if isinstance(error, Failure):
        return f"infermesh: {error}", error.code
    name = type(error).__name__
    if name in ("Abort", "Exit"):  # typer's own: an interrupted prompt or run
        return "infermesh: stopped", getattr(error, "exit_code", FAILED)
    if name == "MeshError":
        return f"infermesh: {error} [{error.reason.value}]", FAILED
    if name == "ValidationError" and hasattr(error, "errors"):
        lines = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {_plain(e['msg'])}" for e in error.errors()]
        return "infermesh: " + "\n".join(lines), BAD_USAGE
    if isinstance(error, ValueError):
        return f"infermesh: {error}", BAD_USAGE
    if isinstance(error, ModuleNotFoundError):
        return f"infermesh: {error}; this environment lacks it: run `make setup`, or start it in the right one", FAILED
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"infermesh: {error.filename}: {error.strerror}", FAILED
    return f"infermesh: {name}: {error} (INFERMESH_DEBUG=1 shows the traceback)", FAILED


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ")


def _tell(text: str, code: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return code
