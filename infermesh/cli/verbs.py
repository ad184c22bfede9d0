"""From a verb to its module, imported when it is called; `infermesh --help` reads only the table below.

A verb is a file `infermesh/cli/<verb>.py` with a function `command` in typer's annotations. Its docstring is the help;
what follows a line `Examples:` is shown as it stands. Every option gets the variable INFERMESH_<OPTION> here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import typer
import typer.core
import typer.main

# typer carries a click of its own from 0.26 on; the classes that both have are reached through it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

VERBS: dict[str, str] = {
    "up": "Run a whole mesh on this machine: registry, gateway and instances.",
    "chat": "Ask a model and stream its answer.",
    "embed": "Turn texts into vectors.",
    "rerank": "Order documents by relevance to a query; without one: run a rerank service.",
    "instances": "List what is registered, and how it is doing.",
    "top": "Watch the fleet, live.",
    "explain": "Show where a request would go, and why.",
    "plan": "Plan what runs on which card, and check it in virtual time.",
    "import": "Read another server's configuration and write a fleet file.",
    "render": "Write files that start a fleet with Docker Compose or on Kubernetes.",
    "sim": "Try routing policies and fleets on a trace, in virtual time.",
    "calibrate": "Measure how fast an instance is, for the router, up, plan and sim.",
    "verify": "Check that an instance answers as transformers does with the same weights.",
    "bench": "Load a gateway: first tokens, pace, throughput, goodput.",
    "record": "Write a trace of live traffic, without prompts, for sim.",
    "drain": "Let an instance finish its work and leave.",
    "undrain": "Take a drain back while the instance still finishes its work.",
    "ban": "Take an instance out of work on all gateways.",
    "unban": "Lift a ban.",
    "doctor": "Check this machine and say what to do.",
    "health": "Ask one process whether it serves, for container health checks.",
    "gateway": "Run one gateway.",
    "llm": "Run one LLM service.",
    "embedding": "Run one embedding service.",
    "registry": "Run the embedded registry.",
    "version": "Print versions.",
}


class Root(typer.core.TyperGroup):
    """The group of all verbs; it imports one when it is called for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load(cmd_name) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(VERBS)}"
            raise UsageError(f"no verb {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def root() -> Any:
    """The command line as a whole."""
    return Root(
        name="infermesh",
        help="One address for a fleet of LLM, embedding and rerank services.",
        epilog="\b\nStart with:\n  infermesh up\n  infermesh chat 'Why is the sky blue?'\n\b\n"
        "Every option has a variable: --gateway is INFERMESH_GATEWAY.",
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def load(verb: str) -> Any:
    """The command of a verb, with help, examples and variables in place."""
    module = import_module(f"infermesh.cli.{verb.replace('-', '_')}")
    if hasattr(module, "build"):
        return module.build()
    return with_defaults(command_of(module.command, verb), getattr(module, "SETTINGS", {}))


def command_of(function: Any, verb: str) -> Any:
    """Turns an annotated function into a command."""
    text, examples = split_docstring(function.__doc__ or "")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(verb, help=text, epilog=examples, context_settings={"help_option_names": ["-h", "--help"]})(function)
    command: Any = typer.main.get_command(app)
    for option in command.params:
        if isinstance(option, typer.core.TyperOption) and not option.envvar and "help" not in option.opts[0]:
            option.envvar = variable(option.opts + option.secondary_opts)
            option.show_envvar = True
    return command


def with_defaults(command: Any, settings: Mapping[str, Mapping[str, str]]) -> Any:
    """Shows what an option is unless given, where a settings class says it and the help does not. `settings`:
    module:class -> its fields whose options are called otherwise."""
    found = {}
    for path, renamed in settings.items():
        module, _, name = path.partition(":")
        for field, info in getattr(import_module(module), name).model_fields.items():
            if info.default and isinstance(info.default, int | float | str) and info.default is not True:
                found[renamed.get(field, field)] = str(info.default)
    for option in command.params:
        if option.name in found and option.default is None and "unless told" not in (option.help or ""):
            option.show_default = found[option.name]
    return command


def variable(names: list[str]) -> str:
    """--api-key-file -> INFERMESH_API_KEY_FILE"""
    longest = max((name for name in names if not name.startswith("--no-")), key=len)
    return "INFERMESH_" + longest.lstrip("-").replace("-", "_").upper()


def split_docstring(docstring: str) -> tuple[str, str]:
    """Help and examples; the examples keep their line breaks."""
    text, _, examples = re.sub(r"(?m)^Examples?:\s*$", "\0", inspect.cleandoc(docstring), count=1).partition("\0")
    lines = inspect.cleandoc(examples).splitlines()
    return text.strip(), "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""
